"""Several fleets at once, each in a process of its own: compiling overlaps with training, and every GPU of the machine has work.

    together(work, [(directory, fleet), ...], workers=4, device="cuda")

A worker writes only its fleets' own directories; the caller holds the study's lock. On several GPUs worker i uses number i modulo their count. On a
CPU the threads are shared out, which for small models is faster than one fleet on all of them. Not here: what a job does (``driver``).
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import multiprocessing

from shoal.config.fields import ConfigError

POLL = 0.5  # seconds between looks at whether all workers are alive
Job = tuple[Any, ...]


def together(work: Callable[..., None], jobs: Sequence[Job], workers: int, device: str, follow: Callable[[Job], Sequence[Job]] | None = None) -> None:
    """``work(*job)`` for every job, in spawned processes, in the order of the list. The first error ends the others' training after their
    current chunk, as Ctrl-C does: each saves a checkpoint, so that nothing is lost, and the error is raised here.

    ``follow``: called here with every job that is done; the jobs it gives go to the end of the list.
    """
    context = multiprocessing.get_context("spawn")
    todo, told = context.Queue(), context.Queue()
    given: list[Job] = []

    def give(more: Sequence[Job]) -> None:
        for job in more:
            todo.put((len(given), job))
            given.append(job)

    give(jobs)
    num = min(workers, len(jobs))
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    threads, compilers = max(1, torch.get_num_threads() // num), max(1, (os.cpu_count() or 1) // num)
    processes = [context.Process(target=_worker, args=(work, todo, told, i % gpus if gpus else None, threads, compilers, os.getpid())) for i in range(num)]
    for process in processes:
        process.start()
    try:
        done = 0
        while done < len(given):
            job = given[_next(processes, told)]
            done += 1
            give(follow(job) if follow else ())
        for _ in processes:
            todo.put(None)
    except BaseException:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)  # pyright: ignore[reportArgumentType] (a process that is alive has a number)
        raise
    finally:
        for process in processes:
            process.join()


def _next(processes: Sequence[Any], told: Any) -> int:
    """The number of the next job that is done; an error a worker met is raised."""
    while True:
        if told.empty() and any(process.exitcode not in (None, 0) for process in processes):
            raise RuntimeError("a worker ended without a word (killed, perhaps for want of memory); the same command goes on from its last checkpoint")
        try:
            word = told.get(timeout=POLL)
        except queue.Empty:
            continue
        if word is None:
            raise KeyboardInterrupt
        if isinstance(word, tuple):
            raise ConfigError(*word)
        if isinstance(word, str):
            raise RuntimeError(f"in a worker:\n{word}")
        return word


def _worker(work: Callable[..., None], todo: Any, told: Any, gpu: int | None, threads: int, compilers: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group of processes; the parent tells when to stop
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(threads)
    if gpu is not None:
        torch.cuda.set_device(gpu)  # what "cuda" then means
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(compilers))  # else every worker starts one compiler for each core
    try:
        while os.getppid() == parent:
            try:
                job = todo.get(timeout=POLL)
            except queue.Empty:
                continue
            if job is None:
                break
            number, arguments = job
            work(*arguments)
            if gpu is not None:
                gc.collect()
                torch.cuda.empty_cache()  # for the neighbours: there may be nothing to do here for a while
            told.put(number)
    except KeyboardInterrupt:
        told.put(None)
    except ConfigError as error:
        told.put((error.path, error.message))
    except Exception:
        told.put(traceback.format_exc())
