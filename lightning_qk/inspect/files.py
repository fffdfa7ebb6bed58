"""Files that belong to a checkpoint, by name: in a folder, or of a model on the hub."""

import difflib
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning_qk._printable import one_line
from lightning_qk.inspect.documents import BadInput

Fetch = Callable[[str], Path | None]
"""The file of a name; None where there is none."""

CONFIG, ADAPTER = "config.json", "adapter_config.json"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
"""A model's name on the hub."""


def path_of(name: str) -> Path:
    """A name as a path.

    Raises:
        BadInput: no path has such a name.
    """
    try:
        path = Path(name).expanduser()
        with suppress(PermissionError):  # reported when it is opened
            path.exists()
    except (RuntimeError, OSError, ValueError) as error:
        shown = name if len(name) <= 100 else f"{name[:100]}…"
        raise BadInput(
            f"expected a path or the name of a model on the hub, got {shown!r} ({one_line(error)}): correct it"
        ) from error
    return path


def near_hint(path: Path) -> str:
    """The end of a message about a path that does not exist: the name beside it that may be meant."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return "; correct it"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {str(path.with_name(close[0]))!r}?" if close else "; correct it"


def local_files(folder: Path) -> Fetch:
    """The files of a folder."""

    def fetch(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return fetch


def hub_files(name: str, revision: str | None) -> Fetch:
    """Files of a model on the hub, from its cache or, where they are not in it, from the network.

    Raises:
        BadInput: neither has the model. A single file that is not there is None.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def cached(file: str) -> Path | None:
        found = try_to_load_from_cache(name, file, revision=revision)
        return Path(found) if isinstance(found, str) else None

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file, revision=revision))
        except LocalEntryNotFoundError as error:
            if any(cached(known) for known in (CONFIG, ADAPTER)):
                return None
            raise BadInput(
                "expected a path that exists, or a model of the hub that is in its cache or can be "
                f"downloaded, got {name!r}{near_hint(Path(name))}, or try again with a network and without "
                "HF_HUB_OFFLINE"
            ) from error
        except EntryNotFoundError:
            return None
        except GatedRepoError as error:
            raise BadInput(
                f"expected a model that may be downloaded, got {name!r}, whose owner has to allow it: ask on "
                "its page, then log in with `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise BadInput(f"expected a revision that {name} has, got {revision!r}: correct it") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise BadInput(
                f"expected a path that exists or a model on the hub, got {name!r}: correct it, or log in "
                "with `hf auth login` where it is private"
            ) from error
        except PermissionError as error:
            raise BadInput(
                f"expected a cache that may be written, got {error.filename}: change HF_HOME"
            ) from error
        except Exception as error:  # whatever the network's library raises
            found = cached(file)
            if found is not None:
                return found
            raise BadInput(
                f"expected to reach the hub for {name!r}, got {one_line(error)}: try again later"
            ) from error

    return fetch
