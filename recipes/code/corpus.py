"""Build the corpus: Python of permissively licensed packages, cleaned, without copies, split by package.

    python recipes/code/corpus.py --out DIR

Downloads the wheels that `packages.tsv` names with pip, checks their hashes, takes the Python files out and writes

    DIR/train.jsonl, DIR/held_out.jsonl    a document a line: text, package, version, path, licence
    DIR/LICENCES.md                        every package with its licence
    DIR/report.json                        what was kept and what was left out, by reason

Only wheels are used, so no package's code ever runs. A held-out document that shares a fifth of its lines, in runs of
eight, with the training part is left out: it would measure memory.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import platform
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from filters import clean, drop_by_path, drop_by_text, fingerprint, windows

LIST = Path(__file__).with_name("packages.tsv")
# Compiled packages are read for their Python only; one platform's wheel is named so that every machine gets the same.
TARGET = [
    *("--python-version", "3.12", "--implementation", "cp"),
    *(f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)),
    *("--platform=manylinux2014_x86_64", "--platform=any"),
]
MAX_PACKAGE_BYTES = 3 << 20  # no package becomes the style of the model
COPIED = 0.2

Row = dict[str, str]
Document = dict[str, str]


def read_list(path: Path = LIST) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def fetch(rows: list[Row], folder: Path) -> None:
    """Download what `folder` lacks, with pip's own check of the hashes, then check every file again."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [row for row in rows if not (folder / row["file"]).exists()]
    if missing:
        lines = [f"{row['name']}=={row['version']} --hash=sha256:{row['sha256']}" for row in missing]
        wanted = folder / "requirements.txt"
        wanted.write_text("\n".join(lines) + "\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        subprocess.run([*pip, *TARGET, "-d", str(folder), "-r", str(wanted)], check=True)
    for row in rows:
        found = hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest()
        if found != row["sha256"]:
            sys.exit(f"{folder / row['file']}: sha256 is {found}, the list says {row['sha256']}")


def documents(row: Row, wheel: Path, dropped: Counter[str]) -> Iterator[Document]:
    """The clean Python files of a wheel, in an order that spreads a large package's cut over all of it."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        taken = 0
        for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
            reason = drop_by_path(name)
            text = None if reason else clean(archive.read(name))
            if not reason:
                reason = "not UTF-8" if text is None else drop_by_text(text)
            if not reason and taken > MAX_PACKAGE_BYTES:
                reason = "package is large"
            if reason or text is None:
                dropped[reason] += 1
                continue
            taken += len(text)
            yield {
                "text": text,
                "package": row["name"],
                "version": row["version"],
                "path": name,
                "licence": row["licence"],
            }


def collect(rows: list[Row], folder: Path, dropped: Counter[str]) -> dict[str, list[Document]]:
    """Documents by part, without copies. The training part is read first, so that copies leave the held-out part."""
    seen: set[bytes] = set()
    parts: dict[str, list[Document]] = {"train": [], "held-out": []}
    for row in sorted(rows, key=lambda row: (row["part"] != "train", row["name"])):
        for document in documents(row, folder / row["file"], dropped):
            key = fingerprint(document["text"])
            if key in seen:
                dropped["copy"] += 1
                continue
            seen.add(key)
            parts[row["part"]].append(document)
        print(f"{row['name']}: {sum(map(len, parts.values()))} documents", file=sys.stderr)
    return parts


def without_copies(held_out: list[Document], train: list[Document], dropped: Counter[str]) -> list[Document]:
    """The held-out documents that are new: less than `COPIED` of their runs of lines are in the training part."""
    wanted: dict[int, list[int]] = defaultdict(list)
    runs = [windows(document["text"]) for document in held_out]
    for index, own in enumerate(runs):
        for run in own:
            wanted[run].append(index)
    met: set[int] = set()
    for document in train:
        met |= windows(document["text"]) & wanted.keys()
    kept = []
    for document, own in zip(held_out, runs, strict=True):
        if len(own & met) <= COPIED * len(own):
            kept.append(document)
        else:
            dropped["held-out, but much of it is in train"] += 1
    return kept


def write(parts: dict[str, list[Document]], rows: list[Row], dropped: Counter[str], out: Path) -> None:
    report: dict[str, object] = {"python": platform.python_version(), "dropped": dict(dropped.most_common())}
    sizes: Counter[str] = Counter()
    for part, found in parts.items():
        path = out / f"{part.replace('-', '_')}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for document in found:
                sizes[document["package"]] += len(document["text"].encode())
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
        count = sum(len(document["text"].encode()) for document in found)
        packages = len({document["package"] for document in found})
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        report[part] = {"documents": len(found), "bytes": count, "packages": packages, "sha256": digest}
    table = ["| package | version | licence | part | bytes used |", "|---|---|---|---|---|"]
    for row in rows:
        used = sizes[row["name"]]
        table.append(f"| {row['name']} | {row['version']} | {row['licence']} | {row['part']} | {used} |")
    (out / "LICENCES.md").write_text("\n".join(table) + "\n")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, help="where the wheels are kept (OUT/wheels)")
    options = parser.parse_args()
    rows, wheels = read_list(), options.wheels or options.out / "wheels"
    options.out.mkdir(parents=True, exist_ok=True)
    fetch(rows, wheels)
    dropped: Counter[str] = Counter()
    parts = collect(rows, wheels, dropped)
    parts["held-out"] = without_copies(parts["held-out"], parts["train"], dropped)
    write(parts, rows, dropped, options.out)


if __name__ == "__main__":
    main()
