"""Processes that tokenize. They import no more than tokenizing takes, so that they start in a fraction of a second.

Programs of their own and not multiprocessing's: those first import the caller's main module again, jax and all, and
do not notice when the caller is killed. These end with the pipe that feeds them.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from maxlm import storage
from maxlm.data.sources import DataError, Document
from maxlm.data.tokenizer import FIRST, LEARNED, NO_BOS, JsonTokenizer, Kind, Tokenizer, tokenizer_from_bytes

START = "from maxlm.data.worker import serve; serve()"


class WorkerPool:
    """Processes that write part files; one thread of this process feeds each.

    Args:
        tokenizer: what they encode with.
        workers: how many.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int):
        self._hello = {"kind": tokenizer.kind, "eos_id": tokenizer.eos_id, "bos_id": tokenizer.bos_id}, [tokenizer.data]
        self._local = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(workers, "maxlm-tokenize")

    def submit(self, path: str, documents: Sequence[Document]) -> "Future[None]":
        """Has a worker write documents as a part file.

        The future raises StorageError if path cannot be written, and DataError if the worker died.
        """
        return self._threads.submit(self._run, path, documents)

    def close(self) -> None:
        """Drops what has not begun, waits for the rest and ends the processes."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def _run(self, path: str, documents: Sequence[Document]) -> None:
        try:
            process = self._process()
            order = {"path": path, "facts": [document[1:] for document in documents]}
            _send(process.stdin, order, [d.text.encode() for d in documents])
            answer, _ = _receive(process.stdout)
        except (EOFError, BrokenPipeError):
            raise DataError(
                "a tokenizer process died, probably out of memory; run the same command again with fewer --workers, "
                "it continues where it was"
            ) from None
        if "cannot" in answer:
            raise storage.StorageError(answer["cannot"])
        if "bug" in answer:
            raise RuntimeError(f"a tokenizer process failed:\n{answer['bug']}")

    def _process(self) -> "subprocess.Popen[bytes]":
        if not hasattr(self._local, "process"):
            # The same modules as here; -P: and none that happens to lie in the current folder.
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
            command = [sys.executable, "-P", "-c", START]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the builder, which ends its workers.
            )
            self._processes.append(process)
            self._local.process = process
            _send(process.stdin, *self._hello)
        return self._local.process


def serve() -> None:
    """Runs a worker: reads parts from standard input until it ends, answers each with {} or what went wrong."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The processes are the parallelism.
    # Whatever a library prints must not end up among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        hello, (data,) = _receive(sys.stdin.buffer)
        tokenizer = _rebuild(hello["kind"], data, hello["eos_id"], hello["bos_id"])
        while True:
            order, texts = _receive(sys.stdin.buffer)
            documents = [Document(text.decode(), *facts) for text, facts in zip(texts, order["facts"], strict=True)]
            _send(answers, _attempt(tokenizer, order["path"], documents))
    except (EOFError, BrokenPipeError):
        return


def _attempt(tokenizer: Tokenizer, path: str, documents: Sequence[Document]) -> dict[str, str]:
    try:
        storage.write_bytes(path, encode_part(tokenizer, documents))
    except storage.StorageError as error:
        return {"cannot": str(error)}
    except Exception:
        return {"bug": traceback.format_exc()}
    return {}


def encode_part(tokenizer: Tokenizer, documents: Sequence[Document]) -> bytes:
    """Tokenizes documents into the bytes of an .npz file.

    Returns:
        tokens (uint16 or uint32, [bos] ids [eos] of all documents; of conversations their ids and flags, as flagged),
        and per document lengths (int64, in tokens), places (float64, as place), num_bytes and replaced (int64, UTF-8
        bytes).
    """
    head = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    pieces: list[Any] = []
    lengths = []
    dtype = token_dtype(tokenizer.vocab_size)
    if documents[0].spans is not None:
        assert isinstance(tokenizer, JsonTokenizer)
        dtype = np.dtype("<u4")
        pieces = [flagged(*tokenizer.encode_marked(document.text, document.spans or ())) for document in documents]
        lengths = list(map(len, pieces))
    else:
        for ids in tokenizer.encode_batch([document.text for document in documents]):
            pieces += [head, ids, [tokenizer.eos_id]] if head else [ids, [tokenizer.eos_id]]
            lengths.append(len(head) + len(ids) + 1)
    data = [document.text.encode() for document in documents]
    file = io.BytesIO()
    np.savez(
        file,
        tokens=np.concatenate(pieces, dtype=dtype, casting="unsafe"),
        lengths=np.array(lengths, np.int64),
        places=np.array([place(text) for text in data], np.float64),
        num_bytes=np.array([len(text) for text in data], np.int64),
        replaced=np.array([document.replaced_bytes for document in documents], np.int64),
    )
    return file.getvalue()


def place(text: bytes) -> float:
    """A number in [0, 1) that depends on the text alone: below the held-out share, a document is held out."""
    return (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def flagged(ids: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """The tokens of one conversation with what a store says of each in its upper bits.

    Args:
        ids: uint32 [num_tokens], below FIRST.
        learned: bool [num_tokens], whether the assistant says it.

    Returns:
        uint32 [num_tokens]: ids + LEARNED where learned, + FIRST at the first.
    """
    tokens = ids | np.where(learned, np.uint32(LEARNED), np.uint32(0))
    tokens[:1] |= np.uint32(FIRST)
    return tokens


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every token id, little-endian."""
    return np.dtype("<u2" if vocab_size < 1 << 16 else "<u4")


def _rebuild(kind: Kind, data: bytes, eos_id: int, bos_id: int | None) -> Tokenizer:
    return tokenizer_from_bytes(kind, data, eos_id, NO_BOS if bos_id is None else bos_id)


def _send(pipe: Any, message: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
    """Writes a line of JSON, and the parts behind it as they are."""
    pipe.write(json.dumps([message, list(map(len, parts))]).encode() + b"\n")
    pipe.writelines(parts)
    pipe.flush()


def _receive(pipe: Any) -> tuple[dict[str, Any], list[bytes]]:
    """Reads what _send has written.

    Raises:
        EOFError: the other end is gone.
    """
    if not (line := pipe.readline()).endswith(b"\n"):
        raise EOFError
    message, sizes = json.loads(line)
    parts = [pipe.read(size) for size in sizes]
    if sum(map(len, parts)) != sum(sizes):
        raise EOFError
    return message, parts
