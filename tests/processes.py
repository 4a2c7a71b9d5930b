"""Four processes that stay: starting Python and torch takes seconds, a job in a running process milliseconds.

    with Pool(4) as pool:
        results = pool.run(2, job, *arguments)      # job(world, *arguments) in two of them, results by rank

A job is a function of an importable module of the tests.
"""

import dataclasses
import importlib
import multiprocessing
import os
import queue as queues
import tempfile
import traceback

from command import PATIENCE

PROCESSES = 4


def _serve(rank, size, folder, jobs, results):
    os.environ["CLLM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from cllm.distributed.launch import entered
    from cllm.distributed.world import World

    torch.set_num_threads(1)
    number = 0
    while (job := jobs.get()) is not None:
        number += 1
        count, module, name, arguments = job
        if rank >= count:
            continue
        try:
            store = dist.FileStore(os.path.join(folder, f"store-{number}"), count)
            dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=count)
            world = World(rank, count, rank, count, torch.device("cpu"), dist.PrefixStore("cllm", store), 60.0)
            dist.barrier()  # a job may exchange nothing: who ends it first must not close connections that others are still making
            with entered(world):
                results.put((rank, True, getattr(importlib.import_module(module), name)(world, *arguments)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@dataclasses.dataclass
class Pool:
    size: int = PROCESSES

    def __enter__(self):
        self._start()
        return self

    def _start(self):
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(["torch.distributed", "torch.distributed.fsdp", "numba", "tokenizers", "process_jobs"])
        self._folder = tempfile.TemporaryDirectory()
        self._results = forking.Queue()
        self._jobs = [forking.SimpleQueue() for _ in range(self.size)]
        self._processes = [
            forking.Process(target=_serve, args=(rank, self.size, self._folder.name, self._jobs[rank], self._results), daemon=True)
            for rank in range(self.size)
        ]
        for process in self._processes:
            process.start()

    def run(self, count, job, *arguments, timeout=PATIENCE):
        for queue in self._jobs:
            queue.put((count, job.__module__, job.__name__, arguments))
        answers, failures = [], []
        try:
            answers = [self._results.get(timeout=timeout) for _ in range(count)]
            failures = [text for _, fine, text in answers if not fine]
        except queues.Empty:
            failures = [f"only some of {count} processes answered within {timeout} s"]
        if failures:  # the others may still wait for the one that failed: the next job gets new processes
            self._end(patience=0)
            self._start()
        assert not failures, "\n".join(failures)
        return [value for _, _, value in sorted(answers)]

    def __exit__(self, *exc):
        self._end(patience=20)

    def _end(self, patience):
        for queue in self._jobs:
            queue.put(None)
        for process in self._processes:
            process.join(timeout=patience)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
