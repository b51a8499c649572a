"""What a selection bought: small models on all of the text, a random tenth, each method's tenth (extra `prove`)."""
