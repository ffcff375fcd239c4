"""Saves a sharded model: each process writes its own part."""

import warnings
from contextlib import suppress

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from kqv.errors import first_line, reason_of
from kqv.files import put_in_place, remove, sha256_of_file
from kqv.formats.checkpoint import REST, previous_of, save
from kqv.formats.sharded import METADATA, PARTS, first_cause
from kqv.training.saver import Saver


class ShardedSaver(Saver):
    """
    A Saver in every process: each writes its own part of the model and optimizer, in a thread beside
    training, to a new folder. When all are done, the main process renames that folder.
    """

    def __init__(self, world, *arguments):
        super().__init__(*arguments)
        self.world = world
        self.release_copies()
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # raised by torch 2.9's own code

    def stage(self, contents):
        parts = {"model": contents["model"], "optimizer": contents["optimizer"]["state"]}
        rest = {name: value for name, value in contents.items() if name not in parts}
        staged = self.stager.stage(parts)
        self.stager.cache_staged_state_dict = True  # the next save uses the same host memory
        self.stager.state_dict_cache = staged
        return {**self.copy(rest), **staged}

    def release_copies(self):
        super().release_copies()
        # A stager that keeps its memory takes it pinned, which a GPU alone can use.
        self.stager = BlockingAsyncStager(cache_staged_state_dict=self.world.device.type == "cuda")

    def save_file(self, path, contents):
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)  # a thread begins with GPU 0, for which dcp would wait
        beside = path.with_name(f".{path.name}.new")
        self.in_main_process(remove, beside)  # nobody writes before the old folder is gone
        parts = {name: value for name, value in contents.items() if name in PARTS}
        rest = {name: value for name, value in contents.items() if name not in PARTS}
        try:
            dcp.save(parts, storage_writer=dcp.FileSystemWriter(beside), process_group=self.world.saving)
            self.in_main_process(self.finish, beside, path, rest)
        except CheckpointException as error:
            raise RuntimeError(first_line(first_cause(error))) from None
        finally:
            if self.world.is_main:
                with suppress(OSError):  # in one process alone: the others would wait for it
                    remove(beside)

    def finish(self, beside, path, rest):
        """Write what is not in parts, and put the folder in its place."""
        rest["metadata_sha256"] = sha256_of_file(beside / METADATA)
        save(beside / REST, rest)
        put_in_place(beside, path, previous_of(path))

    def in_main_process(self, do, *arguments):
        outcome = [None, None]  # what it returned, why it failed
        if self.world.is_main:
            try:
                outcome[0] = do(*arguments)
            except BaseException as error:  # of any kind: the others wait to hear of it
                outcome[1] = reason_of(error)
        dist.broadcast_object_list(outcome, group=self.world.saving)
        result, problem = outcome
        if problem:
            raise RuntimeError(problem)
        return result
