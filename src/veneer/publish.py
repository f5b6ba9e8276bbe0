"""Adapters to and from the hub: what goes up is listed first, what comes down is checked before it is kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import AdapterError

__all__ = ["HubError", "Pulled", "Upload", "plan_upload", "pull_adapter", "push_adapter"]

ENDINGS = (".json", ".safetensors", ".md", ".txt", ".model", ".jinja", ".yaml")
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class HubError(AdapterError):
    """The hub said no, or nothing; hint says what to do."""

    def __init__(self, problem: str, hint: str = ""):
        self.problem, self.hint = problem, hint
        super().__init__(f"{problem}. {hint}" if hint else problem)


@dataclass(frozen=True)
class Upload:
    """files: name in the repository -> a file, or the bytes that go in its place. left_out: files of the folder that
    are no part of an adapter. notes: what whoever loads it should know."""

    repo: str
    files: dict[str, Path | bytes]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in sorted(self.files.items())}

    @property
    def card(self) -> str:
        held = self.files["README.md"]
        return (held if isinstance(held, bytes) else held.read_bytes()).decode("utf-8")


@dataclass(frozen=True)
class Pulled:
    """commit: of the repository. base, revision, fingerprint: of the model that it was trained on, as far as the
    adapter says. differences: of the base that is here, one line a weight; None where `unchecked` says why none was
    looked at."""

    folder: Path
    commit: str | None
    base: str | None
    revision: str | None = None
    fingerprint: str | None = None
    differences: list[str] | None = None
    unchecked: str = ""


# -- up ------------------------------------------------------------------------------------------------------------
def plan_upload(adapter: str, repo: str, *, base: str | None = None) -> Upload:
    """What `push_adapter` would send: the adapter, its tokenizer, its card and, from a run's folder, the recipe.

    base: the hub id of the model that it was trained on, written in place of the name that the adapter holds. Card
    and recipe go without absolute paths of this machine. Raises AdapterError where there is no adapter, and where its
    base is a folder of this machine and no other name is given.
    """
    from .base_mark import lines, read_mark
    from .train.bases import BUNDLED
    from .train.use import find_adapter, read_adapter_config

    folder = find_adapter(adapter)
    if folder is None:
        raise AdapterError(f"{adapter}: there is no adapter_config.json here; name the folder that holds it")
    weights = next((folder / n for n in WEIGHTS if (folder / n).is_file()), None)
    if weights is None:
        raise AdapterError(f"{folder} holds none of {', '.join(WEIGHTS)}; save the adapter again")
    config = read_adapter_config(folder)
    own = config.get("base_model_name_or_path") or ""
    if base is None and (not own or Path(own).exists() or Path(own).is_absolute() or own.lower().endswith(".gguf")):
        what = f"names its base as {own!r}, which nobody else has" if own else "does not name its base"
        raise AdapterError(f"{folder} {what}; give the base's hub id with --base OWNER/MODEL")
    every = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    files: dict[str, Path | bytes] = {p.name: p for p in every if p.suffix in ENDINGS or p == weights}
    recipe = folder.parent / "recipe.yaml"
    settings = recipe.read_text(encoding="utf-8") if folder.name == "adapter" and recipe.is_file() else ""
    mark = read_mark(weights)
    name = base or own
    if name != own:
        files["adapter_config.json"] = _json({**config, "base_model_name_or_path": name})
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else _card(config, name, "\n".join(lines(mark)))
    names = {**_paths(settings), str(folder): repo, str(folder.resolve()): repo, own: name}
    files["README.md"] = _public(text, repo, names).encode()
    if settings:
        files["recipe.yaml"] = _public(settings, repo, names).encode()
    notes = [f"{name} is a name that veneer alone knows; --base gives another"] * (name.lower() in BUNDLED)
    notes += ["no fingerprint of the base: it was not saved by veneer"] * (mark is None)
    return Upload(repo, files, tuple(p.name for p in every if p.name not in files), tuple(notes))


def _json(held: dict[str, Any]) -> bytes:
    return (json.dumps(held, indent=2, sort_keys=True) + "\n").encode()


def _card(config: dict[str, Any], base: str, about_base: str) -> str:
    """For an adapter without one."""
    kind = str(config.get("peft_type", "")).lower()
    head = f"---\nbase_model: {base!r}\nlibrary_name: peft\ntags:\n- {kind!r}\n- veneer\n---\n"
    return f"{head}\n# {kind} adapter for {base}\n\n{about_base}"


def _paths(recipe: str) -> dict[str, str]:
    """Absolute paths in a recipe -> the names of what they lead to."""
    import yaml

    def walk(held: Any) -> Iterator[str]:
        if isinstance(held, dict | list):
            for value in held.values() if isinstance(held, dict) else held:
                yield from walk(value)
        elif isinstance(held, str) and Path(held).is_absolute():
            yield held

    return {path: Path(path).name for path in walk(yaml.safe_load(recipe))}


def _public(text: str, repo: str, names: dict[str, str]) -> str:
    """A text without this machine's names: the longest first, since one may begin another."""
    for old in sorted(filter(None, names), key=len, reverse=True):
        new = names[old].replace("\\", r"\\")
        text = re.sub(rf"(?<![\w/.-]){re.escape(old)}(?![\w/-])", new, text)
    return text.replace("In this folder:\n", f"After `veneer pull {repo} --out adapter`, in that folder:\n")


def push_adapter(
    adapter: str | Upload,
    repo: str,
    *,
    base: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload an adapter in one commit, to a repository that is made where it is missing; returns the commit's URL.

    adapter: a folder, see plan_upload for what goes of it, or what plan_upload gave. token: else the one that
    `hf auth login` or HF_TOKEN left. Raises AdapterError as plan_upload does, HubError where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    upload = plan_upload(adapter, repo, base=base) if isinstance(adapter, str) else adapter
    with _said(repo, "write to"):
        api = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, held) for name, held in sorted(upload.files.items())]
        done = api.create_commit(
            repo, operations, commit_message=message or "Upload adapter", revision=revision, create_pr=create_pr
        )
    return str(done.pr_url or done.commit_url)


# -- down ----------------------------------------------------------------------------------------------------------
def pull_adapter(
    repo: str, out: str | Path, *, revision: str | None = None, base: str | None = None, token: str | None = None
) -> Pulled:
    """Download an adapter into a new folder and compare the base that is on this machine with its fingerprint.

    base: a folder or name to compare with, by default the adapter's own; no base is downloaded. Raises HubError where
    the hub refuses, AdapterError where the repository holds no adapter or the folder exists; nothing is left then.
    """
    from huggingface_hub import HfApi, snapshot_download

    from .export.onnx import new_folder

    with new_folder(Path(out)) as partial:
        with _said(repo, "read"):
            commit = HfApi(token=token).model_info(repo, revision=revision).sha
            kinds = [f"*{ending}" for ending in ENDINGS] + [WEIGHTS[1]]
            snapshot_download(repo, revision=commit, local_dir=partial, allow_patterns=kinds, token=token)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the library's notes on the download
        if not (partial / "adapter_config.json").is_file():
            raise AdapterError(f"{repo} holds no adapter_config.json, so it is no adapter; nothing was kept")
        found = _look(partial, commit, base)
    return Pulled(Path(out), *found)


def _look(folder: Path, commit: str | None, base: str | None) -> tuple[Any, ...]:
    """The fields of Pulled after its folder."""
    from .base_mark import compare, read_mark
    from .config import PeftConfig
    from .train.errors import RecipeError

    config: Any = PeftConfig.from_pretrained(str(folder))
    weights = next((folder / n for n in WEIGHTS if (folder / n).is_file()), None)
    if weights is None:
        raise AdapterError(f"it holds none of {', '.join(WEIGHTS)}; nothing was kept")
    name, mark = config.base_model_name_or_path, read_mark(weights)
    wanted = base or name
    if mark is None:
        return commit, name, None, None, None, "the adapter holds no fingerprint of its base"
    held = (commit, name, mark["revision"], mark["hash"])
    if not wanted:
        return *held, None, "the adapter does not name its base"
    try:
        return *held, compare(mark, _base_here(str(wanted), config)), ""
    except (AdapterError, RecipeError) as error:
        return *held, None, str(error)


def _base_here(name: str, config: Any) -> Any:
    """The base over its files, as far as they are on this machine; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from .export.mapped import mapped_model
    from .export.merging import local_folder
    from .opened import model_class
    from .train.bases import load_config, resolve_base

    ref = resolve_base(name)
    if ref.kind == "hub":
        try:
            snapshot_download(ref.name, revision=ref.revision, local_files_only=True, allow_patterns=["config.json"])
        except LocalEntryNotFoundError:
            raise AdapterError(f"{name} is not on this machine; loading the adapter will compare it") from None
    return mapped_model(local_folder(ref), model_class(config, load_config(ref))).model


@contextmanager
def _said(repo: str, doing: str) -> Iterator[None]:
    """The hub's errors in words that say what to do."""
    from huggingface_hub import errors

    sign_in = "Sign in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubError("the hub is switched off here by HF_HUB_OFFLINE", "Unset it and try again.") from None
    except errors.HFValidationError as error:
        raise HubError(f"{repo!r} is no repository's name ({error})", "Write OWNER/NAME.") from None
    except errors.LocalTokenNotFoundError:
        raise HubError("there is no token for the hub on this machine", f"{sign_in}.") from None
    except errors.GatedRepoError:
        raise HubError(f"{repo} is open to those who accepted its conditions", "Accept them on its page.") from None
    except errors.RepositoryNotFoundError:
        hint = f"Check the name. A private one shows itself to its owners only: {sign_in[0].lower()}{sign_in[1:]}."
        raise HubError(f"no repository {repo} that may be seen from here", hint) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repo} has no such revision", "Leave --revision out for the newest.") from None
    except errors.HfHubHTTPError as error:
        raise _refusal(error, repo, doing, sign_in) from None
    except OSError as error:  # no connection, a full disk
        raise HubError(f"could not {doing} {repo}: {error}", "Check the connection, and HF_ENDPOINT if set.") from error


def _refusal(error: Any, repo: str, doing: str, sign_in: str) -> HubError:
    status = None if error.response is None else error.response.status_code
    if status == 401:
        return HubError("the hub does not know this token, or none was sent", f"{sign_in}.")
    if status == 403:
        hint = f"Use a token with write access to {repo.partition('/')[0]}, or a repository of your own."
        return HubError(f"the token may not {doing} {repo}", hint)
    if status == 429:
        return HubError("the hub takes no more requests for now", "Try again in a few minutes.")
    detail = error.server_message or str(error).splitlines()[0]
    return HubError(f"the hub answered {status}: {detail}", "Try again later, or with --debug.")
