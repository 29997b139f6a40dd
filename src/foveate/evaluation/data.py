"""The user's copy of a benchmark: question files, image folders, parquet files, or the hub.

Nothing is fetched when a data root is given. What is wrong with single questions is counted in
`Problems`; what leaves nothing to ask is one `FoveateError` with the expected path and hub id.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..base.errors import FoveateError

Fields = dict[str, Any]
ImageBytes = Callable[[], bytes]


class Problems:
    """What was wrong with the data, by kind."""

    SHOWN = 3

    def __init__(self) -> None:
        self.cases: dict[str, list[str]] = {}

    def add(self, kind: str, case: str) -> None:
        self.cases.setdefault(kind, []).append(case)

    @property
    def counts(self) -> dict[str, int]:
        return {kind: len(cases) for kind, cases in self.cases.items()}

    def lines(self) -> list[str]:
        """One line per kind: ``3 missing images: a.jpg, b.jpg, c.jpg``."""
        return [
            f"{len(cases)} {kind}: {', '.join(cases[: self.SHOWN])}"
            + ", ..." * (len(cases) > self.SHOWN)
            for kind, cases in self.cases.items()
        ]

    @property
    def first(self) -> str:
        """The lines as the tail of a sentence, empty without problems."""
        return f" ({'; '.join(self.lines())})" if self.cases else ""

    def __bool__(self) -> bool:
        return bool(self.cases)


class DataSet(Protocol):
    """What messages and look-ups need to know of a benchmark's data."""

    name: ClassVar[str]
    hub: ClassVar[tuple[str, ...]]
    folder: ClassVar[str]
    origin: ClassVar[str]


class Data:
    """What one benchmark reads from.

    Attributes:
        root: the folder with all data sets; None is the hub.
        problems: collects what is wrong.
    """

    def __init__(self, benchmark: DataSet, root: Path | None, problems: Problems) -> None:
        self.benchmark, self.root, self.problems = benchmark, root, problems
        self._folders: dict[Path, dict[str, list[Path]]] = {}
        self._images: dict[tuple[str, ...], Path] = {}
        if root is not None and not root.is_dir():
            raise FoveateError(f"The data root {root} is not a folder: check the path.")

    @property
    def place(self) -> str:
        """Where questions come from, for messages."""
        return str(self.root) if self.root else f"the hub's {' or '.join(self.benchmark.hub)}"

    @property
    def source(self) -> str:
        """Where the user can get the files, for messages."""
        hub = " or ".join(self.benchmark.hub)
        ways = [self.benchmark.origin, f"the hub has it as {hub}" if hub else ""]
        return ", ".join(filter(None, ways))

    # -- files -------------------------------------------------------------------------------------

    def find(self, *names: str) -> Path | None:
        """The first of these paths under the root that exists, as it is or with ``.gz``."""
        if self.root is None:
            return None
        for name in names:
            for path in (self.root / name, self.root / f"{name}.gz"):
                if path.exists():
                    return path
        return None

    def need(self, *names: str) -> Path:
        """`find`, or one sentence with the first name and where to get it."""
        path = self.find(*names)
        if path is None:
            raise self.missing(names[0])
        return path

    def file_or_table(self, *names: str) -> Path | None:
        """The question file; None where the questions are in a table. Refused without either."""
        path = self.find(*names)
        if path is None and self.root is not None and not self.tables():
            raise self.missing(names[0])
        return path

    def missing(self, name: str) -> FoveateError:
        """The error for a file that is needed: where it should be, and where it comes from."""
        if self.root is None:
            return FoveateError(
                f"{self.benchmark.name} cannot be read from the hub: give --data-root DIR with "
                f"DIR/{name} ({self.source})."
            )
        return FoveateError(
            f"{self.benchmark.name}: {self.root / name} is missing: put it there ({self.source})."
        )

    def text(self, path: Path) -> str:
        """The text of a file, unpacked where it ends in ``.gz``; bad bytes are replaced."""
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            try:
                return file.read().decode("utf-8-sig", errors="replace")
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise FoveateError(f"{path} is cut short: get it again.") from error

    def json(self, path: Path) -> Any:
        """The one value in a JSON file."""
        try:
            return json.loads(self.text(path))
        except json.JSONDecodeError as error:
            raise FoveateError(f"{path} is not valid JSON ({error}): get it again.") from error

    def rows(self, path: Path, *required: str) -> Iterator[tuple[int, Fields]]:
        """Position and object of every entry of a JSON array or of JSON lines.

        Entries that cannot be read, or lack a `required` key, are counted and keep their position.
        """
        text = self.text(path).strip()
        rows = _array(text) if text.startswith("[") else map(_line, _filled(text))
        return self._whole(path, rows, required)

    def entries(self, path: Path, key: str, *required: str) -> Iterator[tuple[int, Fields]]:
        """`rows` of the list under `key` in a JSON object."""
        value = self.json(path)
        rows = value.get(key) if isinstance(value, dict) else None
        if not isinstance(rows, list):
            raise FoveateError(f"{path} holds no list {key!r}: it is another file.")
        return self._whole(path, rows, required)

    def _whole(
        self, path: Path, rows: Iterable[Any], required: tuple[str, ...]
    ) -> Iterator[tuple[int, Fields]]:
        for position, row in enumerate(rows):
            if isinstance(row, dict) and all(key in row for key in required):
                yield position, row
            else:
                self.problems.add("broken lines", f"{path.name} entry {position + 1}")

    # -- images ------------------------------------------------------------------------------------

    def image(self, name: str, *folders: str) -> Path:
        """The file `name` under one of `folders`; where it is missing, where it should be.

        Tried as written first, then by the end of the path, upper and lower case alike.
        """
        key = (name, *folders)
        if key not in self._images:
            self._images[key] = self._image(name, *folders)
        return self._images[key]

    def _image(self, name: str, *folders: str) -> Path:
        assert self.root is not None
        name = str(PurePosixPath(name.replace("\\", "/").lstrip("/")))
        for folder in folders:
            if (path := self.root / folder / name).is_file():
                return path
        wanted = tuple(name.lower().split("/"))
        for folder in folders:
            known = self._index(self.root / folder).get(wanted[-1], [])
            if known:
                return max(known, key=lambda path: _common_end(path, wanted))
        self.problems.add("missing images", str(self.root / folders[0] / name))
        return self.root / folders[0] / name

    def _index(self, folder: Path) -> dict[str, list[Path]]:
        """Lower-case file name -> the files called so under `folder`, walked once."""
        if folder not in self._folders:
            names = self._folders[folder] = {}
            for parent, _, files in os.walk(folder):
                for file in sorted(files):
                    names.setdefault(file.lower(), []).append(Path(parent, file))
        return self._folders[folder]

    # -- tables ------------------------------------------------------------------------------------

    def tables(self) -> list[Path]:
        """Parquet or arrow files of this benchmark under the root."""
        if self.root is None:
            return []
        home = self.root / (self.benchmark.folder or self.benchmark.name)
        for pattern in ("*.parquet", "data/*.parquet", "*.arrow", "*/*.arrow"):
            if files := sorted(home.glob(pattern)):
                return files
        return []

    def table(
        self, *required: str, split: str = "test"
    ) -> Iterator[tuple[Fields, ImageBytes, str]]:
        """Rows without their image, a call that gives the image's bytes, and the image's name.

        Read from files under the root, or from the hub's `split`. The name is empty where the
        table has none. Rows that lack a `required` column are refused.
        """
        source = self._hub(split) if self.root is None else self._files()
        for position, (row, picture, name) in enumerate(source):
            if position == 0 and (lost := [key for key in required if key not in row]):
                raise FoveateError(
                    f"{self.benchmark.name}: the table in {self.place} has no column "
                    f"{' or '.join(lost)}, only {', '.join(row)}: it is another data set."
                )
            yield row, picture, name

    def _files(self) -> Iterator[tuple[Fields, ImageBytes, str]]:
        for path in self.tables():
            for batch in range(_batches(path)):
                for i, row in enumerate(_fields(path, batch)):
                    image = row.pop("image", None)
                    name = image.get("path") if isinstance(image, dict) else None
                    yield row, functools.partial(_bytes, path, batch, i), name or ""

    def _hub(self, split: str) -> Iterator[tuple[Fields, ImageBytes, str]]:
        if not self.benchmark.hub:
            raise FoveateError(
                f"{self.benchmark.name} is not on the hub: give --data-root DIR ({self.source})."
            )
        try:
            import datasets
        except ImportError:
            raise FoveateError(
                f"{self.benchmark.name} comes from the hub through the package datasets: "
                "pip install 'foveate[eval]', or give --data-root DIR."
            ) from None
        reason = ""
        for name in self.benchmark.hub:
            if not _hub_answers(name):  # `datasets` would try again for a minute
                datasets.config.HF_HUB_OFFLINE = True  # it then looks into its cache
            try:
                table = datasets.load_dataset(name, split=split)
                break
            except Exception as error:  # offline, renamed, gated: the client has many errors
                reason = (
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
        else:
            raise FoveateError(
                f"{self.benchmark.name}: {self.place} cannot be loaded ({reason}): check the "
                "network, or give --data-root DIR."
            )
        table = table.cast_column("image", datasets.Image(decode=False))
        for i, row in enumerate(table.remove_columns("image")):
            yield row, functools.partial(_hub_bytes, table, i), ""


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached, whatever it says about a data set."""
    try:
        HfApi().dataset_info(name, timeout=10)
    except HfHubHTTPError:
        return True
    except Exception:  # no network, a proxy, a time-out, HF_HUB_OFFLINE: kinds vary
        return False
    return True


def _filled(text: str) -> Iterator[str]:
    return (line for line in text.split("\n") if line.strip())


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _array(text: str) -> Iterator[Any]:
    """The elements of a JSON array; a last one that is cut short comes as None."""
    try:
        yield from json.loads(text)
        return
    except json.JSONDecodeError:
        pass
    decoder, end = json.JSONDecoder(), 1
    while True:
        while end < len(text) and text[end] in ", \t\r\n":
            end += 1
        if text[end : end + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, end)
        except json.JSONDecodeError:
            yield None
            return
        yield value


def _common_end(path: Path, wanted: tuple[str, ...]) -> int:
    """How many parts from the end of `path` equal those of `wanted`."""
    count = 0
    for own, other in zip(reversed(path.parts), reversed(wanted), strict=False):
        if own.lower() != other:
            break
        count += 1
    return count


# -- parquet and arrow -----------------------------------------------------------------------------


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FoveateError(
            "Parquet files need the package pyarrow: pip install 'foveate[eval]'."
        ) from None
    return pyarrow


@functools.lru_cache(maxsize=4)
def _open(path: Path) -> Any:
    arrow = _pyarrow()
    try:
        if path.suffix == ".parquet":
            return arrow.parquet.ParquetFile(path)
        return arrow.ipc.open_stream(arrow.memory_map(str(path))).read_all().to_batches()
    except arrow.ArrowInvalid as error:
        raise FoveateError(f"{path} is damaged or cut short: get it again.") from error


def _batches(path: Path) -> int:
    file = _open(path)
    return file.num_row_groups if path.suffix == ".parquet" else len(file)


def _fields(path: Path, index: int) -> list[Fields]:
    """The rows of one batch; of an image only its name, where it has one."""
    file, arrow = _open(path), _pyarrow()
    schema = file.schema_arrow if path.suffix == ".parquet" else file[index].schema
    columns = [name for name in schema.names if name != "image"]
    image = schema.field("image").type if "image" in schema.names else None
    named = image is not None and arrow.types.is_struct(image) and "path" in image.names
    if path.suffix == ".parquet":
        part = file.read_row_group(index, columns=columns + ["image.path"] * named)
        return part.to_pylist()
    part = arrow.Table.from_batches([file[index]])
    rows = part.select(columns).to_pylist()
    if named:
        for row, image in zip(rows, part["image"].combine_chunks().field("path"), strict=True):
            row["image"] = {"path": image.as_py()}
    return rows


@functools.lru_cache(maxsize=4)
def _images(path: Path, index: int) -> Any:
    """The encoded images of one batch."""
    file = _open(path)
    if path.suffix == ".parquet":
        return file.read_row_group(index, columns=["image"])["image"]
    return file[index].column("image")


def _bytes(path: Path, batch: int, row: int) -> bytes:
    return _encoded(_images(path, batch)[row].as_py())


def _hub_bytes(table: Any, row: int) -> bytes:
    return _encoded(table[row]["image"])


def _encoded(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise FoveateError("The column image of the table holds no image bytes.")
    return data
