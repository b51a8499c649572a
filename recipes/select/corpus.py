"""A pool of several domains in which the one that is wanted is a minority, a sample of that domain, and a held-out set.

    python recipes/select/corpus.py --code CORPUS/train.jsonl --chat dataset.json --out DIR

The domain is scientific Python. Its packages are dealt out whole, by the SHA-256 of their names: to the held-out
set, to the target sample, to the pool; no package is in two of them. `CORPUS/train.jsonl` comes from
`recipes/code/corpus.py`, `dataset.json` from the package chitchat-dataset, the kernel's documentation and dictionary
from Debian's packages linux-doc-6.1 and dict-gcide.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

# As one text: a word a package.
SCIENCE = """
arviz astropy ax-platform biopython botorch chex cirq-core cvxpy darts dask datashader einops flax gluonts gpytorch
gymnasium imbalanced-learn jax keras kornia lifelines mesa mne mpmath narwhals networkx nibabel nilearn numba numpy
optax optuna orbax-checkpoint pandas patsy pennylane peft pint prophet pulp pyomo pyro-ppl pytensor pytorch-metric-
learning pyvista qiskit scikit-image scikit-learn scipy seaborn shap simpy sktime stable-baselines3 statsmodels
sunpy sympy timm torchmetrics torchvision trimesh tslearn umap-learn uncertainties vispy xarray yt
"""
SHARES = {"science": 0.12, "python": 0.42, "kernel": 0.18, "dictionary": 0.16, "chat": 0.12}  # of the pool's characters
LEAST, MOST = 800, 7000  # characters of a document
SAMPLE, HELD_OUT = 300_000, 400_000  # characters
LINUX, GCIDE = "/usr/share/doc/linux-doc-6.1/Documentation", "/usr/share/dictd/gcide.dict.dz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, help="train.jsonl of recipes/code/corpus.py")
    parser.add_argument("--chat", type=Path, required=True, help="dataset.json of the package chitchat-dataset")
    parser.add_argument("--linux", type=Path, default=Path(LINUX), help="Documentation of linux-doc-6.1")
    parser.add_argument("--gcide", type=Path, default=Path(GCIDE), help="gcide.dict.dz of dict-gcide")
    parser.add_argument("--characters", type=int, default=5_000_000, help="of the pool")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rng = random.Random(0)
    science, python = read_code(args.code)
    roles: dict[str, list[dict]] = defaultdict(list)
    for package, rows in science.items():
        roles[role_of(package)] += rows
    domains = {
        "science": roles["pool"], "python": [row for rows in python.values() for row in rows],
        "kernel": list(read_kernel(args.linux)), "dictionary": list(read_dictionary(args.gcide)),
        "chat": list(read_chat(args.chat)),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in domains.items():
        write(args.out / "pool" / f"{name}.jsonl", draw(rows, SHARES[name] * args.characters, rng))
    write(args.out / "target.jsonl", draw(roles["target"], SAMPLE, rng))
    write(args.out / "held_out.jsonl", draw(roles["held out"], HELD_OUT, rng))
    names = {role: sorted(package for package in science if role_of(package) == role) for role in roles}
    (args.out / "packages.json").write_text(json.dumps(names, indent=1))


def role_of(package: str) -> str:
    place = int(hashlib.sha256(package.encode()).hexdigest(), 16) % 5
    return {0: "held out", 1: "target"}.get(place, "pool")


def read_code(path: Path) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """Rows of scientific and of other packages, by package."""
    science: dict[str, list[dict]] = defaultdict(list)
    python: dict[str, list[dict]] = defaultdict(list)
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            side = science if row["package"] in SCIENCE.split() else python
            side[row["package"]].append(
                document(f"{row['package']}/{row['path']}", row["text"], "code", row["licence"])
            )
    return science, python


def read_kernel(folder: Path) -> Iterator[dict]:
    for path in sorted(folder.rglob("*.rst.gz")):
        yield document(path.name, gzip.decompress(path.read_bytes()).decode(errors="replace"), "text", "GPL-2.0-only")


def read_dictionary(path: Path) -> Iterator[dict]:
    """Some entries at a time: alone they are a line or two."""
    text = gzip.decompress(path.read_bytes()).decode(errors="replace")
    entries = re.split(r"\n(?=\S)", text)[50:]
    piece = ""
    for number, entry in enumerate(entries):
        piece += entry + "\n"
        if len(piece) > 2500:
            yield document(f"gcide/{number}", piece, "text", "GPL-1.0-or-later")
            piece = ""


def read_chat(path: Path) -> Iterator[dict]:
    for name, one in json.loads(path.read_text()).items():
        turns = [" ".join(message["text"] for message in turn) for turn in one["messages"]]
        yield document(f"chat/{name}", "\n".join(f"- {turn}" for turn in turns), "text", "MIT")


def document(name: str, text: str, kind: str, licence: str) -> dict:
    return {"id": name, "text": text, "metadata": {"kind": kind, "licence": licence}}


def draw(rows: list[dict], characters: float, rng: random.Random) -> list[dict]:
    rows = [row for row in rows if LEAST <= len(row["text"]) <= MOST]
    rng.shuffle(rows)
    out, total = [], 0
    for row in rows:
        if total >= characters:
            break
        out.append(row)
        total += len(row["text"])
    return out


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)} documents, {sum(len(row['text']) for row in rows)} characters")


if __name__ == "__main__":
    main()
