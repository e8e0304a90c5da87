"""Text files to token files: read, tokenize in worker processes, write in the order of the input."""

import multiprocessing
import signal
from array import array
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ext.data.pieces import NoBoundaryError, pieces
from megatron_ext.data.reading import Chunk, InvalidRecordError, check_files, parse_record, place, read_chunks
from megatron_ext.data.token_files import Sidecar, TokenPaths, read_sidecar
from megatron_ext.data.token_writer import TokenFileWriter, token_dtype
from megatron_ext.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError

_AHEAD = 4  # chunks per worker that may be under way: keeps workers busy while the first result is awaited


@dataclass(frozen=True)
class PreprocessOptions:
    """How text becomes tokens. The number of workers changes the speed, never the output."""

    tokenizer: str = "gpt2"
    """``gpt2`` or the path of a tokenizers JSON file."""

    json_key: str = "text"
    """Key that holds the text in JSON lines."""

    append_eod: bool = True
    """End every document with the tokenizer's end-of-document token."""

    workers: int = 1
    """Processes that tokenize; 1 works in the calling process."""

    skip_invalid: bool = False
    """Count records that are no document and go on, where otherwise the first one ends it."""

    overwrite: bool = False
    """Replace existing output."""


@dataclass(frozen=True)
class PreprocessProgress:
    """State after another chunk; the last one of a finished run has ``finished`` set."""

    bytes_read: int
    """Bytes of the input files (compressed, where they are) done so far."""

    documents: int
    """Documents written."""

    tokens: int
    """Tokens written, separators included."""

    empty: int
    """Documents without text, which are left out."""

    invalid: int
    """Records skipped under ``skip_invalid``."""

    first_invalid: str | None = None
    """Why the first of them was."""

    finished: Sidecar | None = None
    """Set when the files have been written."""


@dataclass(frozen=True)
class _Encoded:
    """One chunk's result. ``tokens`` are all documents' ids one after the other."""

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    empty: int
    problems: tuple[str, ...]
    bytes_read: int


@dataclass(frozen=True)
class _Encoder:
    """What a worker does to a chunk."""

    tokenizer: Tokenizer
    json_key: str
    append_eod: bool

    def encode(self, chunk: Chunk) -> _Encoded:
        tokens = array("i")
        lengths: list[int] = []
        problems: list[str] = []
        empty = 0
        for record in chunk.records:
            before = len(tokens)
            try:
                for piece in pieces(parse_record(chunk.path, record, self.json_key), self.tokenizer.backend):
                    tokens.extend(array("i", self.tokenizer.encode(piece)))
            except InvalidRecordError as error:
                problems.append(str(error))
                continue
            except NoBoundaryError as error:
                problems.append(f"{place(chunk.path, record)}: {error}")
                del tokens[before:]
                continue
            if len(tokens) == before:
                empty += 1
                continue
            if self.append_eod:
                tokens.append(self.tokenizer.eod)
            lengths.append(len(tokens) - before)
        return _Encoded(
            tokens=np.frombuffer(tokens, dtype=np.int32) if tokens else np.empty(0, dtype=np.int32),
            lengths=np.array(lengths, dtype=np.int32),
            empty=empty,
            problems=tuple(problems),
            bytes_read=chunk.bytes_read,
        )


@lru_cache(maxsize=1)
def _encoder_of_worker(options: PreprocessOptions) -> _Encoder:
    """The encoder of a worker process, loaded for its first chunk and kept for the others."""
    return _Encoder(load_tokenizer(options.tokenizer), options.json_key, options.append_eod)


def _encode_in_worker(options: PreprocessOptions, chunk: Chunk) -> _Encoded:
    return _encoder_of_worker(options).encode(chunk)


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent alone ends the run.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def preprocess(files: tuple[Path, ...], output: Path, options: PreprocessOptions) -> PreprocessProgress:
    """Like :func:`preprocess_steps`, all at once: the last progress, with ``finished`` set."""
    return deque(preprocess_steps(files, output, options), maxlen=1)[0]


def preprocess_steps(files: tuple[Path, ...], output: Path, options: PreprocessOptions) -> Iterator[PreprocessProgress]:
    """Write PREFIX.bin, .idx and .json for ``output`` = PREFIX, yielding the progress after every chunk.

    Memory is bounded by the chunks under way (about 256 KiB each, :data:`_AHEAD` per worker) and the longest document, of
    which at most 8 times its size is needed (data/pieces.py says for which tokenizers; for others 200 times). Nothing is
    left behind when the iteration ends early, and what a killed process left is removed.

    Raises:
        UserError: input missing, damaged or without a document; an invalid record (unless skipped); existing output.
    """
    check_files(files)
    _check_output(files, output, options)
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least 1 is needed")
    tokenizer = load_tokenizer(options.tokenizer)
    chunks = (chunk for path in files for chunk in read_chunks(path))
    encoded = _in_workers(chunks, options) if options.workers > 1 else _in_place(chunks, tokenizer, options)
    writer = TokenFileWriter(output, dtype=token_dtype(tokenizer.vocab_size))
    with _writing(output), closing(encoded) as results, writer:
        done = PreprocessProgress(bytes_read=0, documents=0, tokens=0, empty=0, invalid=0)
        for result in results:
            if result.problems and not options.skip_invalid:
                raise UserError(f"{result.problems[0]}; --skip-invalid goes on without such records")
            writer.add(result.tokens, result.lengths)
            done = _advance(done, result, writer)
            yield done
        if not writer.documents:
            skipped = f" ({done.invalid} invalid records skipped)" if done.invalid else ""
            raise UserError(f"empty corpus: no document in {', '.join(map(str, files))}{skipped}")
        finished = writer.commit(
            tokenizer=options.tokenizer,
            tokenizer_digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod if options.append_eod else None,
        )
    yield replace(done, finished=finished)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Say what is wrong with the place of the output; reading has said its own errors by then."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({error.strerror or error}); choose a place with space that this "
            "user may write"
        ) from error


def _advance(done: PreprocessProgress, result: _Encoded, writer: TokenFileWriter) -> PreprocessProgress:
    return PreprocessProgress(
        bytes_read=done.bytes_read + result.bytes_read,
        documents=writer.documents,
        tokens=writer.tokens,
        empty=done.empty + result.empty,
        invalid=done.invalid + len(result.problems),
        first_invalid=done.first_invalid or (result.problems[0] if result.problems else None),
    )


def _in_place(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, options: PreprocessOptions
) -> Generator[_Encoded, None, None]:
    encoder = _Encoder(tokenizer, options.json_key, options.append_eod)
    yield from (encoder.encode(chunk) for chunk in chunks)


def _in_workers(chunks: Iterator[Chunk], options: PreprocessOptions) -> Generator[_Encoded, None, None]:
    """Encode in processes, results in the order of ``chunks``, with a bounded number under way."""
    # Spawned, not forked: the tokenizer library has threads, and a fork would copy their locks.
    pool = ProcessPoolExecutor(
        max_workers=options.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    try:
        pending: deque[Future[_Encoded]] = deque(
            pool.submit(_encode_in_worker, options, chunk) for chunk in islice(chunks, _AHEAD * options.workers)
        )
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(_encode_in_worker, options, chunk) for chunk in islice(chunks, 1))
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenizes was killed; the usual cause is too little memory for the longest document on this "
            "machine: use fewer --workers, or break the document up"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check_output(files: tuple[Path, ...], output: Path, options: PreprocessOptions) -> None:
    if output.suffix in {".bin", ".idx"}:
        raise UserError(f"--output {output}: give the prefix without {output.suffix}")
    if not output.name:
        raise UserError(f"--output {output}: a prefix such as data/corpus is needed")
    paths = TokenPaths.of(output)
    inputs = {path.resolve() for path in files}
    for path in (paths.bin, paths.idx, paths.sidecar):
        if path.resolve() in inputs:
            raise UserError(f"--output {output} would write {path}, which is an input file; choose another prefix")
        if path.exists() and not options.overwrite:
            raise UserError(f"{path} exists; choose another --output or add --overwrite")
    if paths.sidecar.exists() and read_sidecar(paths.sidecar) is None:
        raise UserError(f"{paths.sidecar} exists and is not a description of token files; choose another --output")
