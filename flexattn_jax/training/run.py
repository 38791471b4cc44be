"""One training run from settings to a model folder: what train.py calls."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import track

from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.store import save_model
from flexattn_jax.checkpoints.trees import param_shapes
from flexattn_jax.config import ConfigError, VLMConfig, dotted, from_dict
from flexattn_jax.files import FileError, lock_file, read_json, write_whole
from flexattn_jax.inputs.batching import BatchError, Buckets
from flexattn_jax.inputs.conversations import ConversationError
from flexattn_jax.inputs.datasets.llava import HOMES, Skipped, read_llava
from flexattn_jax.inputs.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from flexattn_jax.models.flops import peak_flops, step_flops
from flexattn_jax.models.vlm import VLM
from flexattn_jax.partitioning import Partition, PartitionConfig, make_partition, with_shardings
from flexattn_jax.processes import ProcessFault, Vote, check_shared, is_first, on_first, together
from flexattn_jax.training.checkpoints import Checkpointer, CheckpointFault
from flexattn_jax.training.data import (
    BatchPlan,
    BatchSource,
    ConversationSource,
    SampleSource,
    make_iterator,
    split_off,
)
from flexattn_jax.training.logging import SKIPPED, RunLog
from flexattn_jax.training.loop import LoopConfig, Run, StopRequest, TrainingFault, mean_loss, train
from flexattn_jax.training.optimizer import OptimizerConfig, build_optimizer
from flexattn_jax.training.pictures import draw_selection, first_with_pictures, make_selection
from flexattn_jax.training.start import Start, StartConfig, open_start
from flexattn_jax.training.state import TrainState, create_state
from flexattn_jax.training.step import LossFn, alpha_ramp, make_eval_step, make_train_step, vlm_loss

MODEL = "model"
RUN = "run.json"
MAX_STEPS = 2**31 - 1  # they are counted in int32

# Mistakes of the user's, each of which says what to do; anything else that is raised is a fault of the program.
USER_ERRORS = (
    TrainingFault,
    CheckpointFault,
    CheckpointError,
    ConversationError,
    ConfigError,
    TokenizerError,
    BatchError,
    ProcessFault,
)


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run learns from.

    train: samples.
    held_out: samples to evaluate on; None: some of `train` are.
    skipped: what is left out, and why.
    """

    train: SampleSource
    held_out: SampleSource | None = None
    skipped: Sequence[Skipped] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned from it.

    loss_fn: see training/step.py.
    extra: seed -> parameters that are trained along and left out of the model.
    trains_tower: that and no answers: otherwise the tower gets no gradient, and evaluation draws the cells that answers
      select.
    """

    loss_fn: LossFn
    extra: Callable[[int], dict] = lambda seed: {}
    trains_tower: bool = False


# (tokenizer, what the run begins with, workdir) -> Data.
MakeData = Callable[[Tokenizer, Start, Path], Data]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Static sizes, and what is held out."""

    text_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 1472)  # T without the picture's slots
    answer_rows: tuple[int, ...] = (16, 64, 256, 512, 1024, 1472)  # R
    eval_samples: int = 256  # held out of training, drawn by the seed
    window: int = 64  # batches that are sorted by length together

    def __post_init__(self):
        Buckets(text_lengths=self.text_lengths)
        Buckets(text_lengths=self.answer_rows)
        if self.window < 1:
            raise ConfigError(f"data.window is {self.window}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What is learned depends on all of this but `loop`, `partition` and the exports."""

    start: StartConfig
    data: DataConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    partition: PartitionConfig = dataclasses.field(default_factory=PartitionConfig)
    batch_size: int = 384  # samples a step, on all devices together
    accumulation: int = 1  # parts of a step's batch, one after the other in memory
    epochs: float = 1.0
    seed: int = 0
    export: str = "last"  # or "best": the checkpoint with the lowest evaluation loss
    export_dtype: str = "float32"  # of the parameters in workdir/model; or "bfloat16"

    def __post_init__(self):
        if self.batch_size < 1 or self.accumulation < 1 or self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} must be a positive multiple of accumulation {self.accumulation}"
            )
        if self.epochs <= 0 or self.seed < 0:
            raise ConfigError(f"epochs {self.epochs} must be above 0, and seed {self.seed} not below it")
        if self.export not in ("last", "best") or self.export_dtype not in ("float32", "bfloat16"):
            raise ConfigError(
                f"export is {self.export!r} and export_dtype {self.export_dtype!r}; known are last and best, float32 "
                "and bfloat16"
            )


def run_llava(settings: Mapping[str, Any], workdir: str | Path) -> Path:
    """Trains on conversations in LLaVA's format; `settings` are those of configs/train_llava.py."""
    own = {name: settings["data"][name] for name in ("conversations", "pictures", "max_length", "follow_links")}
    sizes = {name: value for name, value in settings["data"].items() if name not in own}
    settings = {name: settings[name] for name in settings} | {"data": sizes}
    for name in ("conversations", "pictures"):
        if not own[name]:
            raise ConversationError(f"--config.data.{name} is not given; {HOMES}")

    def make_data(tokenizer: Tokenizer, start: Start, folder: Path) -> Data:
        conversations, skipped = read_llava(own["conversations"], own["pictures"], own["follow_links"])
        progress = functools.partial(track, description=f"tokenising {len(conversations)} conversations")
        source = ConversationSource(
            conversations,
            Path(own["pictures"]),
            tokenizer,
            start.config,
            own["max_length"],
            folder / "lengths.npz",
            progress,
        )
        return Data(source, skipped=skipped + source.skipped)

    return run_training(settings, workdir, make_data, also={"data": own})


def vlm_task(model: VLM, grounding: float = 0.0) -> Task:
    """Next-token loss on answers; `grounding` as in `vlm_loss`."""
    return Task(vlm_loss(model, grounding))


def run_training(
    settings: Mapping[str, Any],
    workdir: str | Path,
    make_data: MakeData,
    make_task: Callable[[VLM], Task] = vlm_task,
    also: Mapping[str, Any] | None = None,
) -> Path:
    """Trains a model, or goes on where a run in this workdir stopped, and writes workdir/model.

    Args:
        settings: of RunConfig by name, and `model`, nested overrides of the model's configuration (None: as it is).
        workdir: of this run alone.
        make_data: what to learn from.
        make_task: what to learn.
        also: further settings that what is learned depends on.

    Returns:
        The folder of the trained model, which `flexattn_jax.load` opens.

    Raises:
        one of USER_ERRORS. SystemExit(0) after SIGTERM, when the state is saved.
    """
    settings = dict(settings)
    overrides = dotted(settings.pop("model", {}))
    config: RunConfig = from_dict(settings, RunConfig)
    workdir = Path(workdir)
    with StopRequest() as stop, together(USER_ERRORS), _locked(workdir):
        start = open_start(config.start, overrides, config.seed)
        tokenizer = load_tokenizer(start.tokenizer)
        data = make_data(tokenizer, start, workdir)
        if not len(data.train):
            reason = data.skipped[0].reason if data.skipped else "-"
            raise ConversationError(f"no sample can be used; the first reason: {reason}")
        digest = data.train.digest
        identity = dataclasses.asdict(config) | {"model": overrides, "also": dict(also or {}), "digest": digest}
        for name in ("loop", "partition", "export", "export_dtype"):  # nothing that is learned depends on them
            del identity[name]
        on_first(lambda: _claim(workdir, identity))
        check_shared(workdir, RUN)
        return _run(config, start, data, make_task(VLM(start.config)), workdir, stop)


def _run(config: RunConfig, start: Start, data: Data, task: Task, workdir: Path, stop: StopRequest) -> Path:
    vlm, loop = start.config, config.loop
    if not task.trains_tower and any(
        name.strip().startswith("vision") for name in config.optimizer.trainable.split(",")
    ):
        raise ConfigError(
            f"optimizer.trainable is {config.optimizer.trainable!r}, but the vision tower gets no gradient here"
        )
    source, held_out = data.train, data.held_out
    if held_out is None:
        held_out = source
        train_rows, eval_rows = split_off(len(source), config.data.eval_samples, config.seed)
    else:
        train_rows, eval_rows = np.arange(len(source)), np.arange(min(len(held_out), config.data.eval_samples))
    steps_per_epoch = -(-len(train_rows) // config.batch_size)
    if config.epochs * steps_per_epoch > MAX_STEPS:
        raise ConfigError(
            f"epochs is {config.epochs:g}, {steps_per_epoch} steps each; lower it: a run has at most {MAX_STEPS} steps"
        )
    total = max(1, round(config.epochs * steps_per_epoch))
    buckets = Buckets(text_lengths=config.data.text_lengths)
    size = config.batch_size // config.accumulation
    partition = make_partition(config.partition, samples=size)
    plan = BatchPlan(config.batch_size, buckets, config.data.answer_rows, config.seed, config.data.window)
    plan = dataclasses.replace(plan, places=partition.rows(config.batch_size))
    train_source = BatchSource(source, train_rows, vlm, plan, total, loop.threads)
    part = dataclasses.replace(plan, batch_size=size, places=partition.rows(size))
    eval_source = BatchSource(held_out, eval_rows, vlm, part, threads=loop.threads)
    shown = BatchSource(held_out, eval_rows, vlm, dataclasses.replace(part, places=None), threads=loop.threads)

    optimizer = build_optimizer(config.optimizer, total)
    create = functools.partial(create_state, config=config.optimizer, optimizer=optimizer, seed=config.seed)
    like = jax.eval_shape(create, param_shapes(vlm) | task.extra(config.seed))
    shardings = partition.state_shardings(like)
    checkpointer = Checkpointer(workdir, loop.keep, _say)
    log = None
    try:
        with together(USER_ERRORS):  # before what follows, which would wait for processes that are gone
            batches = make_iterator(train_source, loop.read_ahead)
            newest = checkpointer.latest_step
            if newest is None:
                params = start.params(partition) | task.extra(config.seed)
                state = jax.jit(create, donate_argnums=0, out_shardings=shardings)(params)
                del params
            else:
                state, place = checkpointer.restore(newest, with_shardings(like, shardings))
                batches.set_state(place)
                _say(f"going on from the checkpoint of step {newest} in {workdir}")
            log = RunLog(workdir, int(state.step), jax.process_index())
            for name, reason in data.skipped if is_first() else ():
                log.skipped(name, reason)
            _say(
                f"{len(train_rows)} samples to train on, {len(eval_rows)} to evaluate on, "
                f"{log.skipped_count} cannot be used" + (f", see {workdir / SKIPPED}" if log.skipped_count else "")
            )
            _say(f"{_count(state.trained)} of {_count(state.params)} parameters are trained")
            _say(f"{total} steps, {steps_per_epoch} an epoch")
            if partition.mesh.size > 1:
                mesh = ", ".join(f"{axis} {size}" for axis, size in partition.mesh.shape.items())
                _say(f"{partition.mesh.size} devices of {jax.process_count()} processes: {mesh}")
            warmup = vlm.flexattention.warmup if vlm.reads_highres else 0.0
            alpha = alpha_ramp(warmup, steps_per_epoch)
            step = make_train_step(
                task.loss_fn,
                optimizer,
                alpha,
                config.accumulation,
                config.optimizer.ema_decay,
                partition,
                shardings,
            )
            run = Run(
                config=loop,
                total_steps=total,
                steps_per_epoch=steps_per_epoch,
                step=step,
                evaluate=_evaluation(task, vlm, eval_source, shown, partition, loop, log),
                flops=_flops(vlm, config, state),
                checkpointer=checkpointer,
                log=log,
                workdir=workdir,
                say=_say,
                place=functools.partial(partition.place_batch, samples=config.batch_size),
                vote=Vote(partition) if jax.process_count() > 1 else None,
            )
            state, finished = train(run, state, batches, stop)
            if not finished:
                raise SystemExit(0)
            if log.skipped_count:
                _say(f"{log.skipped_count} samples were left out; {workdir / SKIPPED} lists them")
            return _export(config, start, state, shardings, checkpointer, workdir)
    finally:
        if log is not None:
            log.close()
        checkpointer.close()


def _evaluation(
    task: Task,
    config: VLMConfig,
    source: BatchSource,
    shown: BatchSource,
    partition: Partition,
    loop: LoopConfig,
    log: RunLog,
) -> Callable:
    """What `Run.evaluate` is: `source` makes this process's share of the batches, `shown` whole ones to draw."""
    eval_step, selection = make_eval_step(task.loss_fn, partition), make_selection(VLM(config), partition)
    place = functools.partial(partition.place_batch, samples=source.batch_size)

    def evaluate(state: TrainState, step: int) -> float | None:
        if not len(source):
            return None
        loss = mean_loss(eval_step, state, make_iterator(source, loop.read_ahead), log, place)
        if loop.pictures and not task.trains_tower and config.reads_highres:
            batch = first_with_pictures(shown[0].data, loop.pictures)
            if batch.labels.shape[0]:
                cells = np.asarray(selection(state.averaged_params, batch))
                for row, pixels in enumerate(np.asarray(batch.batch.pixels)):
                    log.picture(step, f"cells/{row}", draw_selection(pixels, cells[:, row], config))
        return loss

    return evaluate


def _export(
    config: RunConfig,
    start: Start,
    state: TrainState,
    shardings: TrainState,
    checkpointer: Checkpointer,
    workdir: Path,
) -> Path:
    best = checkpointer.best_step
    if config.export == "best" and best is not None and best != int(state.step):
        state, _ = checkpointer.restore(best, with_shardings(state, shardings))
        _say(f"the checkpoint of step {best} has the lowest evaluation loss and is taken")
    dtype = config.export_dtype
    learned = {name: part for name, part in state.averaged_params.items() if name in param_shapes(start.config)}
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), learned)
    save_model(
        workdir / MODEL, dataclasses.replace(start.config, dtype=dtype, remat="none"), params, like=start.tokenizer
    )
    on_first(lambda: None)  # nobody ends before the first process has written what all gave it
    _say(f"trained for {int(state.step)} steps; the model is in {workdir / MODEL}")
    return workdir / MODEL


def _flops(vlm: VLMConfig, config: RunConfig, state: TrainState) -> Callable[[int, int], float] | None:
    devices = list(state.step.devices())
    peak = peak_flops(devices[0])
    if peak is None:
        return None
    trains_decoder = "decoder" in state.trained
    return lambda length, rows: step_flops(vlm, config.batch_size, length, rows, trains_decoder) / (peak * len(devices))


def _count(tree: Any) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(tree)):,}"


def _say(text: str) -> None:
    if is_first():
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Holds a workdir for one run; of several processes the first does."""
    if not is_first():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = lock_file(workdir / ".lock")
    except BlockingIOError:
        raise TrainingFault(f"another run is at work in {workdir}; wait for it or give another --workdir") from None
    except OSError as error:
        raise TrainingFault(f"the workdir {workdir} cannot be written ({error.strerror}); give another one") from error
    with lock:
        yield


def _claim(workdir: Path, identity: dict[str, Any]) -> None:
    """Writes run.json, or checks that the run there is this one and that nothing there is of none."""
    file = workdir / RUN
    identity = json.loads(json.dumps(identity))
    try:
        before = dotted(read_json(file))
    except FileNotFoundError:
        others = [name for name in ("checkpoints", MODEL) if (workdir / name).exists()]
        if others:
            raise TrainingFault(
                f"{workdir} has {' and '.join(others)} in it and no {RUN}, so they are of another program or run and "
                "would be replaced; give another --workdir"
            ) from None
        write_whole(file, json.dumps(identity, indent=1) + "\n")
        return
    except (FileError, AttributeError):
        raise TrainingFault(f"{file} is damaged; give another --workdir to begin afresh") from None
    now = dotted(identity)
    changed = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        what = "; ".join(changed).replace("digest was", "the data changed: its digest was")
        raise TrainingFault(
            f"{workdir} holds a run with other settings ({what}); give another --workdir, or the same settings"
        )
