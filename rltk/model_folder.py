"""The model a run starts from, as files: found, complete, and its sizes read. No torch, no transformers."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rltk
from rltk import gguf
from rltk.compose import JUDGE, groups
from rltk.config import Config
from rltk.errors import ConfigError
from rltk.nearest import meant

PACKAGED = "pkg://rltk."  # pkg://rltk.models/tiny: a folder inside the installed package
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What a model folder may hold that a run reads. A Hub repository's other files (ONNX, GGUF, TensorFlow) stay there.
HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.jinja", "*.txt", "*.model"]
# Some folders (Mistral's) hold their weights a second time, under other names, for other programs.
ANOTHER_FORMAT = "consolidated"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, from config.json and the headers of its weight files. None: the files do not say."""

    context: int | None  # positions
    parameters: int | None  # as stored: a tied head counts once
    kv_values: int | None  # numbers that one token leaves in the KV cache
    weight_bytes: int  # of the weight files
    attention_cap: float | None = None  # of attention's logits (Gemma 2); None: there is none
    window: int | None = None  # positions that some layer sees at most; None: every layer sees all
    short_rope: int | None = None  # positions up to which longrope has factors of their own; None: another rope


def resolve_model(config: Config) -> Config:
    """The config with the model's folder and chat template absolute, the judge's likewise (unless a server has it).
    A Hub id becomes its folder, fetched where need be; so does a GGUF file in a package, converted where need be."""
    folder, template = _folder(config.model.path, "model"), _absolute(config.model.chat_template)
    config = replace(config, model=replace(config.model, path=folder, chat_template=template))
    judge = config.reward.genrm
    if not judge.enabled or judge.url:
        return config
    if judge.name == "server":
        raise ConfigError(f"{JUDGE}.url has no value: write {JUDGE}=http://<host>:<port>/v1 {JUDGE}.model=<name there>")
    judge = replace(judge, model=_folder(judge.model, JUDGE), chat_template=_absolute(judge.chat_template))
    return replace(config, reward=replace(config.reward, genrm=judge))


def _folder(path: str, key: str) -> str:
    """`key`: what the user typed before the path."""
    if path.startswith("pkg://"):
        return str(_packaged(path, key))
    if path.startswith(gguf.SCHEME):
        return str(gguf.folder_of(path))
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser().resolve())
    if HUB_ID.fullmatch(path):
        return str(_from_hub(path, key))
    known = groups()[key.replace(".", "/")]
    near = meant(path, known) if "/" not in path else ""
    named = ", ".join(name for name in known if name not in ("custom", "server", "none"))
    raise ConfigError(
        f"{key} {path!r}: no such folder{near}. Give a Hugging Face folder, a Hub id as owner/name, or one of {named}"
    )


def _absolute(template: str | None) -> str | None:
    return str(Path(template).expanduser().resolve()) if template else None


def _packaged(path: str, key: str) -> Path:
    if not path.startswith(PACKAGED):
        raise ConfigError(f"{key} {path!r}: only {PACKAGED}<folder> names a packaged model")
    folder = Path(rltk.__file__).parent / path.removeprefix(PACKAGED)
    if not folder.is_dir():
        raise ConfigError(f"{key} {path!r}: the installed package has no folder {folder}; install rltk again")
    return folder.resolve()


def _from_hub(name: str, key: str) -> Path:
    """The folder of a Hub model: the cache first, so that a run that was started once needs no network."""
    from huggingface_hub import snapshot_download  # half a second, for ids only

    wanted = {"allow_patterns": HUB_FILES, "ignore_patterns": [f"{ANOTHER_FORMAT}*"]}
    try:
        return Path(snapshot_download(name, local_files_only=True, **wanted))
    except (OSError, ValueError):
        pass
    try:
        return Path(snapshot_download(name, **wanted))
    except Exception as error:  # the client raises its HTTP library's errors too; the fix is the same for all
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{key} {name!r}: no such folder here, not in the Hub's local cache, and it could not be fetched "
            f"({type(error).__name__}: {why}). Check the spelling; for a gated model set HF_TOKEN; without a network "
            f"give a folder, as in {key}=path/to/folder"
        ) from None


def folder_problems(path: str, chat_template: str | None, key: str = "model") -> Iterator[str]:
    """What is missing or broken in a model's folder, each with its fix. `key`: the group whose model it is."""
    folder, own = Path(path), "model.path" if key == "model" else f"{key}.model"
    if not folder.is_dir():
        yield f"{own} = {path!r}: no such folder; give a Hugging Face folder or a Hub id (owner/name)"
        return
    if not (folder / "config.json").is_file():
        yield f"model folder {folder} has no config.json; give a folder that save_pretrained wrote"
    elif not isinstance(_json(folder / "config.json"), dict):
        yield f"{folder / 'config.json'} is not a JSON object; fetch the model again"
    yield from _weight_problems(folder)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        yield f"model folder {folder} has no tokenizer (none of {', '.join(TOKENIZERS)}); save the model's there"
    if chat_template:
        if not Path(chat_template).is_file():
            yield f"{key}.chat_template = {chat_template!r}: no such file; give a Jinja chat template"
    elif not _has_chat_template(folder):
        yield f"model folder {folder} has no chat template; give one with {key}.chat_template=<Jinja file>"


def _weight_problems(folder: Path) -> Iterator[str]:
    files = weight_files(folder)
    if not files:
        yield f"model folder {folder} has no weights (*.safetensors or pytorch_model*.bin); fetch or save them there"
    for index in folder.glob("*.index.json"):
        if index.name.startswith(ANOTHER_FORMAT):
            continue
        named = (_json(index) or {}).get("weight_map", {}).values()
        missing = sorted({name for name in named if not (folder / name).is_file()})
        if missing and not (index.name.startswith("pytorch") and any(f.suffix == ".safetensors" for f in files)):
            yield f"model folder {folder} lacks {', '.join(missing)}, which {index.name} names; fetch the model again"
    for file in files:
        if file.suffix == ".safetensors" and _header(file) is None:
            yield f"{file} is not a safetensors file (cut short, or a git-lfs pointer?); fetch the model again"


def weight_files(folder: Path) -> list[Path]:
    """The weight files that are loaded: safetensors where there are any, else PyTorch's, sorted by name."""
    safetensors = [file for file in folder.glob("*.safetensors") if not file.name.startswith(ANOTHER_FORMAT)]
    return sorted(safetensors) or sorted(folder.glob("pytorch_model*.bin"))


def facts(folder: Path) -> ModelFacts:
    """Sizes of the model in a folder that has no `folder_problems`."""
    top = _json(folder / "config.json") or {}
    text = top.get("text_config", top)  # a multimodal model keeps its language model's shape one level down
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or (text["hidden_size"] // heads if heads and "hidden_size" in text else None)
    files = weight_files(folder)
    headers = [_header(file) for file in files if file.suffix == ".safetensors"]
    tensors = [entry for header in headers if header for key, entry in header.items() if key != "__metadata__"]
    return ModelFacts(
        context=text.get("max_position_embeddings"),
        parameters=sum(math.prod(entry["shape"]) for entry in tensors) if tensors else None,
        kv_values=2 * layers * kv_heads * head_dim if layers and kv_heads and head_dim else None,
        weight_bytes=sum(file.stat().st_size for file in files),
        attention_cap=text.get("attn_logit_softcapping"),
        window=_window(text),
        short_rope=_short_rope(text),
    )


def _window(text: dict[str, Any]) -> int | None:
    """As transformers reads it: `use_sliding_window` may turn it off, and `layer_types` say where it holds; without
    them (Qwen's older folders) it does from layer `max_window_layers` on."""
    window, types = text.get("sliding_window"), text.get("layer_types")
    if not window or text.get("use_sliding_window") is False:
        return None
    if types is not None:
        return window if "sliding_attention" in types else None
    return window if (text.get("max_window_layers") or 0) < text.get("num_hidden_layers", math.inf) else None


def _short_rope(text: dict[str, Any]) -> int | None:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):  # "su": its name in older folders
        return None
    return text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    tokenizer = _json(folder / "tokenizer_config.json")
    return isinstance(tokenizer, dict) and bool(tokenizer.get("chat_template"))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _header(path: Path) -> dict[str, Any] | None:
    """The tensor table of a safetensors file: 8 bytes of length, then JSON. None if the file is no such thing."""
    size = os.path.getsize(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            return None
        try:
            header = json.loads(file.read(length))
            end = max((t["data_offsets"][1] for key, t in header.items() if key != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
    return header if 8 + length + end <= size else None
