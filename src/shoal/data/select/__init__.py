"""Stage two of selection: the documents of a pool that serve a target domain best, so many tokens of them and no more.

One file a method; each is a function from a `Task` to `Scores`. Needs no PyTorch: small models come in as `Proxies`.
"""
