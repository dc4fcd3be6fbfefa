"""The configuration of a run: one TOML file, overrides of the form ``section.key=value``, nothing else.

An unknown key, a wrong type or an impossible value raises `ValueError` with the key, the value and the fix.
No environment variable changes what is trained. Each key says what another value does to a run that goes on.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from scpl_dist.run.layout import Layout
from scpl_dist.run.network import is_loopback
from scpl_dist.run.scores import CONFUSION, MACRO_F1

Positive = Annotated[int, Field(gt=0)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]
USUAL_PORT = 9400  # of the metrics
_layout = cache(Layout)  # the coordinator asks for it with every message


class Effect(Enum):
    """What another value of a key does to a run that goes on from a checkpoint."""

    MODEL = "the checkpoint has other tensors, or they mean something else: the run cannot go on"
    RESULT = "the run goes on, but does not come to what an undisturbed one comes to"
    CONDUCT = "the run is carried out in another way and comes to the same; all its processes need the same"
    PROCESS = "nothing; each process may have its own"


MODEL, RESULT, CONDUCT, PROCESS = Effect


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Run(Section):
    """What is trained, and for how long."""

    method: Annotated[str, MODEL] = "scpl"
    """Training method: scpl, bp, early_exit, gpipe or al, an entry point's name, or ``path/to/file.py:Class``."""
    name: Annotated[str, PROCESS] = ""
    """What the run is called in the name of its folder, ``runs/<time>-<name>``; empty is by its method."""
    args: Annotated[dict[str, Any], RESULT] = Field(default_factory=dict)
    """Settings of a method of your own."""
    seed: Annotated[int, Field(ge=0), RESULT] = 0
    """Seed of the initial weights, the order of samples, augmentation and dropout."""
    epochs: Annotated[Positive, RESULT] = 20
    """Passes over the training set."""
    patience: Annotated[int, Field(ge=0), RESULT] = 0
    """Epochs in a row that are not better than the best before them, which end the run; 0 is never."""
    watch: Annotated[str, RESULT] = "accuracy"
    """What epochs are compared by on the validation part, or else the test part: accuracy, loss and perplexity (the
    lower the better), or one of ``task.metrics`` (the higher the better)."""

    @model_validator(mode="after")
    def _name_is_no_path(self) -> Self:
        if self.name.startswith(".") or {"/", "\\", "\0"} & set(self.name):
            raise ValueError(
                f"run.name = {self.name!r}: becomes part of a folder's name: give a word such as baseline; a folder "
                "elsewhere is named by --run-dir"
            )
        return self


class Model(Section):
    """The network as a list of blocks."""

    name: Annotated[str, MODEL] = "vgg_tiny"
    """A built-in name, ``torchvision:NAME``, ``hf:PATH_OR_NAME`` (Hugging Face), or ``package.module:function`` or
    ``path/to/file.py:function`` that returns blocks."""
    args: Annotated[dict[str, Any], MODEL] = Field(default_factory=dict)
    """Keyword arguments for the model function."""
    weights: Annotated[str, RESULT] = ""
    """File or folder with the first weights: an export of a run, or a state_dict of torch; or published ones by name,
    such as ``torchvision:ResNet18_Weights.IMAGENET1K_V1``; empty draws them, or takes those of an ``hf:`` model."""
    weights_strict: Annotated[bool, RESULT] = True
    """Whether first weights must fit the blocks name by name; false draws what is missing or of another shape."""


class Data(Section):
    """The data set and how it is fed."""

    name: Annotated[str, RESULT] = "digits"
    """A built-in name, ``package.module:function`` or ``path/to/file.py:function`` that returns data sets."""
    root: Annotated[str, CONDUCT] = "data"
    """Folder with the files of the data set."""
    batch_size: Annotated[Positive, RESULT] = 128
    """Samples in a step before augmentation; "strong" augmentation feeds two views of each."""
    drop_last: Annotated[bool, RESULT] = False
    """Leave out the last batch of an epoch where it is smaller than the others."""
    sample_weights: Annotated[str, RESULT] = ""
    """How often samples are drawn, with replacement: "balanced" draws all classes alike, ``path/to/file.py:function``
    gives a weight for each label of the training part; empty feeds each sample once an epoch."""
    augmentation: Annotated[Literal["none", "basic", "strong"], RESULT] = "basic"
    """"none", "basic" (images: shift and, where it makes sense, flip) or "strong" (two views: basic and colour).
    Texts and data sets of your own are fed as they are: "none" and "basic" mean the same, "strong" is refused."""
    workers: Annotated[int, Field(ge=0), CONDUCT] = 1
    """Threads of stage 0 that prepare batches ahead; 0 prepares them in the training thread. Data sets of your own that
    are not just tensors or lists may draw at random: they are read in as many processes, which only Linux has."""
    download: Annotated[bool, CONDUCT] = False
    """Fetch the files of a data set that torchvision can download, if they are not under ``data.root``."""
    text_column: Annotated[str, RESULT] = "text"
    """Column of the texts in a table (``data.name = "csv"``)."""
    label_column: Annotated[str, RESULT] = "label"
    """Column of the labels in a table."""
    args: Annotated[dict[str, Any], RESULT] = Field(default_factory=dict)
    """Keyword arguments for the data function."""


class Pipeline(Section):
    """How the blocks are spread over worker processes."""

    stages: Annotated[Positive, CONDUCT] = 2
    """Parts that the model is cut into; each holds one or more consecutive blocks."""
    replicas: Annotated[Positive | list[Positive], RESULT] = 1
    """Worker processes of each stage, or of every stage its own number; they share each micro-batch."""
    max_in_flight: Annotated[Positive, CONDUCT] = 2
    """Messages that may wait in front of a stage; a slow stage holds the others back beyond that."""
    transport: Annotated[Literal["auto", "rpc", "gloo", "nccl"], CONDUCT] = "auto"
    """How tensors travel between workers: auto takes nccl if every worker has a GPU of its own, and rpc otherwise."""
    wire_dtype: Annotated[Literal["float32", "bfloat16", "float16", "int8"], RESULT] = "float32"
    """Type in which wider floats travel between stages: bfloat16 and float16 halve the bytes of float32, int8 with
    scales quarters them; all of these round what the next stage sees, and so does another number of stages then."""
    micro_batches: Annotated[Positive, RESULT] = 1
    """Parts that a batch is split into: gpipe passes them on one by one; where blocks learn alone they save memory. Not
    for bp, nor for a contrastive loss with BatchNorm, see docs/methods.md."""
    schedule: Annotated[Literal["gpipe", "1f1b"], RESULT] = "gpipe"
    """Order of micro-batches of the method gpipe: all forward then all backward, or one forward one backward."""
    recompute: Annotated[bool, CONDUCT] = False
    """Compute activations again for the backward pass: those of a whole block (bp, gpipe), or of the parts of a block
    where blocks learn alone."""
    deferred_batch_norm: Annotated[bool, RESULT] = False
    """Take BatchNorm's running statistics from the whole batch instead of each micro-batch (gpipe)."""
    partition: Annotated[Literal["uniform", "parameters", "measured"] | list[Positive], CONDUCT] = "uniform"
    """How blocks are assigned to stages, or the number of blocks of each stage."""
    elastic: Annotated[list[Positive], CONDUCT] = Field(default_factory=list)
    """Fewest and most stages, such as [1, 4]: a run that loses a worker for good goes on with fewer, and with more when
    one comes; empty keeps ``pipeline.stages``."""
    balance: Annotated[Literal["off", "auto"], CONDUCT] = "off"
    """"auto" measures each block where it runs, and moves blocks between stages while the run goes on where that pays.
    The result does not change."""


class Loss(Section):
    """The local objective."""

    name: Annotated[str, MODEL] = "supcon"
    """Local loss of the method scpl: supcon, ce, predsim, deinforeg, an entry point's name or a dotted name."""
    args: Annotated[dict[str, Any], RESULT] = Field(default_factory=dict)
    """Keyword arguments for a loss function of your own."""
    temperature: Annotated[PositiveReal, RESULT] = 0.1
    """Divisor of the cosine similarities in the contrastive loss."""
    projector: Annotated[str, MODEL] = "m"
    """"i" identity, "l" linear, "m" two layers; ",avg" pools before it; ",HIDDEN,OUT" sets the widths."""
    divisor: Annotated[Literal["all", "positives"], RESULT] = "all"
    """Divide an anchor's sum by "all" same-label samples, itself included (as published), or by its "positives"."""
    classifier: Annotated[str, MODEL] = "m"
    """Local classifier: "l" linear, "m" two layers as published, or activation and width such as "sigmoid,512"."""
    local_predictors: Annotated[bool, MODEL] = False
    """Train a predictor on the detached output of every block (scpl), so that samples can leave early."""


class TaskSettings(Section):
    """What a right answer is, and how answers are judged."""

    name: Annotated[Literal["classification", "lm"], MODEL] = "classification"
    """"classification", one class a sample, or "lm", the next token at every position of a text."""
    compared: Annotated[Literal["tokens", "halves"], RESULT] = "tokens"
    """What a contrastive loss compares in a language model: "tokens", of which those with the same next one belong
    together, or "halves" of the texts, each the mean over its tokens, of which those of one text do."""
    metrics: Annotated[list[str], CONDUCT] = Field(default_factory=list)
    """Beside accuracy and loss: top5, macro_f1, confusion, an entry point's name or ``path/to/file.py:function``."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), RESULT] = 0.0
    """Share of the target that a cross-entropy spreads evenly over all classes."""
    class_weights: Annotated[Literal["none", "balanced"] | list[PositiveReal], RESULT] = "none"
    """Weights of the classes in a cross-entropy: a number for each, or "balanced" for the inverse of their counts."""


class Association(Section):
    """The label code of the method al (associated learning)."""

    activation: Annotated[Literal["sigmoid", "tanh"], MODEL] = "tanh"
    """"tanh" with linear decoders and a cross-entropy (published: text), or "sigmoid" and squared errors (images)."""
    code: Annotated[Positive, MODEL] = 128
    """Width of the label code between two blocks."""
    bridge: Annotated[int, Field(ge=0), MODEL] = 256
    """Hidden width of the bridge from a block's output to the code; 0 is a single layer."""
    autoencoder_lr: Annotated[PositiveReal, RESULT] = 1.0
    """Factor on the learning rate for the label's encoders and decoders."""


class Optimizer(Section):
    """What changes the weights: an optimizer for each block and its heads."""

    name: Annotated[str, MODEL] = "adam"
    """An optimizer of torch.optim in small letters (adam, adamw, sgd, ...), an entry point's name, or
    ``package.module:Class`` or ``path/to/file.py:Class``, which is called as ``Class(parameters, lr=..., **args)``."""
    args: Annotated[dict[str, Any], RESULT] = Field(default_factory=dict)
    """Keyword arguments for the optimizer, such as momentum and weight_decay."""
    lr: Annotated[PositiveReal, RESULT] = 2e-3
    """Highest learning rate; where it goes from there says the section schedule."""
    end_lr: Annotated[float, Field(ge=0, allow_inf_nan=False), RESULT] = 1e-5
    """Learning rate that a falling schedule reaches at the end."""
    decay_norms: Annotated[bool, MODEL] = True
    """Whether weight_decay holds for biases and the weights of norms too: for parameters of one dimension."""
    clip_norm: Annotated[float, Field(ge=0, allow_inf_nan=False), RESULT] = 0.0
    """Longest gradient of an update, as a vector: of each block where blocks learn alone, of the whole model with bp
    and gpipe; 0 does not clip."""
    clip_value: Annotated[float, Field(ge=0, allow_inf_nan=False), RESULT] = 0.0
    """Largest entry of a gradient; 0 does not clip."""
    accumulate: Annotated[Positive, RESULT] = 1
    """Batches to an update, which takes the mean of their gradients; the last update of an epoch may have fewer."""
    ema: Annotated[float, Field(ge=0, lt=1), RESULT] = 0.0
    """Decay of a moving average of the weights, such as 0.999, which evaluations and exports use; 0 keeps none."""

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if "lr" in self.args:
            raise ValueError(
                f"optimizer.args = {self.args}: the learning rate has a key of its own; set optimizer.lr instead"
            )
        if self.clip_norm and self.clip_value:
            raise ValueError(
                f"optimizer.clip_norm = {self.clip_norm} and optimizer.clip_value = {self.clip_value}: use one of them"
            )
        return self


class Schedule(Section):
    """How the learning rate changes on the way."""

    name: Annotated[str, RESULT] = "cosine"
    """constant; cosine and linear, which fall to ``optimizer.end_lr``; step, which falls at milestones; wsd (warm-up,
    stable, decay), which falls linearly at the end; an entry point's name; or ``package.module:function`` or
    ``path/to/file.py:function``, whose ``function(done, steps)`` gives a factor on ``optimizer.lr``."""
    per: Annotated[Literal["epoch", "step"], RESULT] = "epoch"
    """How often the rate changes: a step is a batch. A warm-up changes it with each step in any case."""
    warmup: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)], RESULT
    ] = 0
    """Steps, or as a number below 1 the share of the run, in which the rate rises before the schedule begins."""
    milestones: Annotated[list[Positive], RESULT] = Field(default_factory=list)
    """Epochs, or steps with ``schedule.per = "step"``, from which on the schedule step has a lower rate."""
    gamma: Annotated[float, Field(gt=0, lt=1), RESULT] = 0.1
    """Factor on the rate at each milestone."""
    decay: Annotated[float, Field(gt=0, le=1), RESULT] = 0.1
    """Share of the run, at its end, in which the schedule wsd falls."""

    @model_validator(mode="after")
    def _keys_mean_something(self) -> Self:
        for key, of in (("milestones", "step"), ("gamma", "step"), ("decay", "wsd")):
            value, field = getattr(self, key), Schedule.model_fields[key]
            if self.name != of and value != field.get_default(call_default_factory=True):
                raise ValueError(
                    f"schedule.{key} = {value}: only schedule.name = {of!r} reads it, this is {self.name!r}; "
                    "leave it out"
                )
        if self.name == "step" and not self.milestones:
            fix = 'give the epochs at which it falls, such as [60, 120], or take schedule.name = "constant"'
            raise ValueError(f'schedule.name = "step" falls at schedule.milestones, which is empty: {fix}')
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"schedule.milestones = {self.milestones}: give each once, in order")
        return self


class Block(Section):
    """What holds for some blocks only; each table ``[[block]]`` is of one block or several."""

    index: Annotated[int, Field(ge=0)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """The block, or a list of blocks, counted from 0."""
    freeze: bool = False
    """Only compute forward, in evaluation mode: no loss, no backward pass, no update, of the block and its heads."""
    freeze_after_epoch: Annotated[int, Field(ge=0)] = 0
    """Epochs that the block learns in before it is frozen; 0 is never."""

    @property
    def blocks(self) -> list[int]:
        return [self.index] if isinstance(self.index, int) else self.index

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.freeze and self.freeze_after_epoch:
            raise ValueError(
                f"block.freeze = true and block.freeze_after_epoch = {self.freeze_after_epoch}, of block.index = "
                f"{self.index}: use one of them"
            )
        if not self.freeze and not self.freeze_after_epoch:
            raise ValueError(
                f"block.index = {self.index}: its table changes nothing; set block.freeze = true or "
                "block.freeze_after_epoch, or leave the table out"
            )
        return self


class Checkpoint(Section):
    """Where a run can go on from."""

    every_steps: Annotated[int, Field(ge=0), CONDUCT] = 0
    """Steps between checkpoints; 0 writes one at the end only."""
    keep: Annotated[Positive, CONDUCT] = 2
    """Newest checkpoints to keep."""
    best: Annotated[bool, CONDUCT] = True
    """Keep the checkpoint of the best epoch by ``run.watch`` too."""


class Metrics(Section):
    """The Prometheus endpoint of the coordinator."""

    host: Annotated[str, PROCESS] = "127.0.0.1"
    """Address to serve on."""
    port: Annotated[Port | Literal["auto"], PROCESS] = "auto"
    """Port to serve on; 0 takes any free one, and auto 9400, or any free one if something has that."""


class Log(Section):
    """Where the numbers of a run go besides its folder."""

    to: Annotated[list[str], PROCESS] = Field(default_factory=list)
    """Loggers: tensorboard, mlflow, wandb, an entry point's name, or ``path/to/file.py:Class``."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"log.to = {self.to}: one is named twice; name each logger once")
        return self


class Trace(Section):
    """The record of what each stage did when, for ``scpl-dist trace`` and the timeline of a report."""

    every: Annotated[int, Field(ge=0), PROCESS] = 0
    """Steps from the beginning of one recorded stretch of 8 steps to that of the next; 1 records all, 0 none."""


class Control(Section):
    """The ZeroMQ endpoint of the coordinator."""

    host: Annotated[str, PROCESS] = "127.0.0.1"
    """Name or address that the coordinator binds and the workers connect to."""
    port: Annotated[Port, PROCESS] = 0
    """Port of the coordinator; 0 takes any free one with the local launcher, and 4711 otherwise."""
    keys: Annotated[str, PROCESS] = ""
    """Folder with the CURVE keys of this process; empty is no encryption, for loopback only."""
    insecure: Annotated[bool, PROCESS] = False
    """Let a coordinator without keys leave loopback: whoever reaches its port can then disturb the run."""

    @model_validator(mode="after")
    def _keys_beyond_loopback(self) -> Self:
        local = self.host == "localhost" or is_loopback(self.host)
        if not local and not self.keys and not self.insecure:
            raise ValueError(
                f"control.host = {self.host!r}: beyond loopback the control plane needs keys; run scpl-dist keys new "
                "DIR and set control.keys to DIR, or on a network that nobody else reaches control.insecure = true"
            )
        return self

    def fixed(self) -> Self:
        """The same with a port that workers on other hosts can know."""
        return self if self.port else self.model_copy(update={"port": 4711})


class Runtime(Section):
    """The worker processes."""

    threads: Annotated[Positive, RESULT] = 1
    """Threads for the operators of one worker."""
    device: Annotated[str | list[str], RESULT] = "auto"
    """Where a stage computes: cpu; cuda, each worker of a host the next GPU; cuda:1, that GPU; or auto, which takes a
    GPU if there is one. A list has one for each stage."""
    precision: Annotated[Literal["float32", "bfloat16", "float16"], RESULT] = "float32"
    """Type in which blocks compute where autocast thinks it safe; weights, losses and optimizers stay in float32.
    float16 scales the loss, so it is for methods whose blocks learn alone."""
    memory_format: Annotated[Literal["contiguous", "channels_last"], RESULT] = "contiguous"
    """Order of images, and of weights that have four dimensions, in memory; channels_last makes convolutions faster."""
    compile: Annotated[bool | Literal["default", "reduce-overhead", "max-autotune"], RESULT] = False
    """Compile each block with torch.compile, once for each size of its inputs; on CPUs this needs a C++ compiler. A
    mode of torch.compile may stand in place of true, which is default: reduce-overhead replays a block's kernels as
    CUDA graphs; max-autotune does so, too, and picks kernels by their measured time, so each run may pick others."""
    tf32: Annotated[bool, RESULT] = False
    """Let GPUs multiply float32 matrices with 10 bits of mantissa, which is faster; CPUs do not care."""
    offload: Annotated[Literal["off", "cpu", "disk"], CONDUCT] = "off"
    """Where blocks are while others compute, for models that are larger than the device: a stage has one block on it
    and the next one on its way. "cpu" is the memory of the host, for GPUs, "disk" a file. Where blocks learn alone."""
    offload_folder: Annotated[str, PROCESS] = ""
    """Folder for ``runtime.offload = "disk"``, on a disk of each host; empty is the run folder."""
    keep_memory: Annotated[bool, PROCESS] = True
    """Keep freed memory for the next step (Linux with glibc) in place of giving it back to the kernel each time."""
    interface: Annotated[str, PROCESS] = ""
    """Network interface of the data plane; empty is loopback for the local launcher, torch's choice elsewhere."""
    timeout_s: Annotated[PositiveReal, CONDUCT] = 60.0
    """Longest time without progress before the run ends with an error, in seconds."""
    first_step_timeout_s: Annotated[PositiveReal, CONDUCT] = 300.0
    """The same for the first step of a stage, which may compile, allocate and read data, in seconds."""
    max_restarts: Annotated[int, Field(ge=0), CONDUCT] = 10
    """Failures that a run survives: the worker is replaced, the others stay, and all go on from the last checkpoint."""
    replace_s: Annotated[PositiveReal, CONDUCT] = 60.0
    """Longest time that the others wait for a worker in place of one that was lost, in seconds."""

    @property
    def compiled(self) -> str:
        """`compile` as it is written in a configuration."""
        return json.dumps(self.compile)

    @property
    def devices(self) -> list[str]:
        """One for each stage, or the one of all."""
        return self.device if isinstance(self.device, list) else [self.device]

    @model_validator(mode="after")
    def _devices_are_known(self) -> Self:
        for device in self.devices:
            if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
                raise ValueError(
                    f"runtime.device = {self.device!r}: {device!r} is none; use auto, cpu, cuda, cuda:1 for the second "
                    "GPU, or a list with one of them for each stage"
                )
        return self


class Config(Section):
    """A whole run. Every field has a default; the defaults are the embedded main job."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    pipeline: Pipeline = Pipeline()
    loss: Loss = Loss()
    task: TaskSettings = TaskSettings()
    al: Association = Association()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    block: Annotated[list[Block], RESULT] = Field(default_factory=list)
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    log: Log = Log()
    trace: Trace = Trace()
    control: Control = Control()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _values_fit_together(self) -> Self:
        lr, end_lr = self.optimizer.lr, self.optimizer.end_lr
        if self.schedule.name in ("constant", "step") or ":" in self.schedule.name:
            if end_lr != Optimizer().end_lr:
                raise ValueError(
                    f"optimizer.end_lr = {end_lr}: schedule.name = {self.schedule.name!r} does not end there; "
                    "leave it out"
                )
        elif end_lr > lr:
            raise ValueError(
                f"optimizer.end_lr = {end_lr} is above optimizer.lr = {lr}: "
                "the schedule can only fall; lower optimizer.end_lr"
            )
        celled = {MACRO_F1, CONFUSION} & set(self.task.metrics)
        if self.task.compared == "halves" and self.task.name != "lm":
            raise ValueError(
                'task.compared = "halves": halves of a text are for task.name = "lm"; leave it out'
            )
        if self.task.name == "lm":
            for key, value, meant in (
                ("data.sample_weights", self.data.sample_weights, ""),
                ("task.class_weights", self.task.class_weights, "none"),
                ("task.metrics", sorted(celled), []),
            ):
                if value != meant:
                    raise ValueError(
                        f'task.name = "lm" and {key} = {value!r}: is for samples that have one class each, and a text '
                        "has none; leave it out"
                    )
        if celled and self.data.batch_size > 60_000:  # of each sample a number, in one message
            raise ValueError(
                f"task.metrics = {self.task.metrics} and data.batch_size = {self.data.batch_size}: {min(celled)} takes "
                "batches of at most 60000 samples; lower data.batch_size"
            )
        named = [block for table in self.block for block in table.blocks]
        twice = [block for block in named if named.count(block) > 1]
        if twice:
            raise ValueError(f"block.index = {twice[0]} is there twice: give each block one table [[block]]")
        stages = self.pipeline.stages
        for key, fix in (
            ("partition", "give one block count for each stage"),
            ("replicas", "give one number of workers for each stage, or one number for all"),
        ):
            counts = getattr(self.pipeline, key)
            if isinstance(counts, list) and len(counts) != stages:
                raise ValueError(
                    f"pipeline.{key} = {counts} has {len(counts)} entries for pipeline.stages = {stages}: {fix}"
                )
        self._check_elastic()
        self._check_devices()
        if self.runtime.offload_folder and self.runtime.offload != "disk":
            raise ValueError(
                f"runtime.offload_folder = {self.runtime.offload_folder!r} and runtime.offload = "
                f'"{self.runtime.offload}": only "disk" has a folder; leave it out'
            )
        if self.runtime.offload != "off" and self.pipeline.partition == "measured":
            raise ValueError(
                f'runtime.offload = "{self.runtime.offload}" and pipeline.partition = "measured": blocks are measured '
                'in one process that holds them all; give block counts, or use "uniform" or "parameters"'
            )
        if self.runtime.compile and self.pipeline.recompute:
            raise ValueError(
                f"runtime.compile = {self.runtime.compiled} and pipeline.recompute = true: what is compiled cannot be "
                "cut into parts or computed again by the same code; use one of them"
            )
        if self.runtime.compile and self.layout.world > self.pipeline.stages:
            raise ValueError(
                f"runtime.compile = {self.runtime.compiled} and pipeline.replicas = {self.pipeline.replicas}: "
                "replicas exchange BatchNorm's statistics inside a block, which cannot be compiled; use one of them"
            )
        if self.runtime.tf32 and set(self.runtime.devices) == {"cpu"}:
            raise ValueError(
                'runtime.tf32 = true and runtime.device = "cpu": only GPUs have it; leave it out'
            )
        return self

    def _check_devices(self) -> None:
        device, stages, pipeline = self.runtime.device, self.pipeline.stages, self.pipeline
        if pipeline.transport == "nccl" and "cpu" in self.runtime.devices:
            raise ValueError(
                f'pipeline.transport = "nccl" and runtime.device = {device!r}: it is between GPUs; use "auto"'
            )
        if not isinstance(device, list):
            return
        if len(device) != stages:
            raise ValueError(
                f"runtime.device = {device} has {len(device)} entries for pipeline.stages = {stages}: give one device "
                "for each stage, or one for all"
            )
        if pipeline.elastic and pipeline.elastic != [stages, stages]:
            raise ValueError(
                f"runtime.device = {device} and pipeline.elastic = {pipeline.elastic}: stages come and go, and a list "
                "says where each of them is; use one device for all"
            )
        if pipeline.partition == "measured" and len({one.partition(":")[0] for one in device}) > 1:
            raise ValueError(
                f'runtime.device = {device} and pipeline.partition = "measured": blocks are measured on one device; '
                "give block counts, or the same kind of device to all"
            )

    def _check_elastic(self) -> None:
        elastic, stages = self.pipeline.elastic, self.pipeline.stages
        if not elastic:
            return
        if len(elastic) != 2 or not elastic[0] <= stages <= elastic[1]:
            raise ValueError(
                f"pipeline.elastic = {elastic} and pipeline.stages = {stages}: give the fewest and the most stages, "
                f"with pipeline.stages between them, such as [1, {stages}]"
            )
        if self.layout.world > stages and elastic != [stages, stages]:
            raise ValueError(
                f"pipeline.elastic = {elastic} and pipeline.replicas = {self.pipeline.replicas}: where stages have "
                f"replicas, these come and go and the stages stay; use pipeline.elastic = [{stages}, {stages}]"
            )

    def shaped(self, replicas: Sequence[int], counts: Sequence[int]) -> Self:
        """The same run by another number of stages, of so many workers and blocks each; no counts leave them open."""
        several = max(replicas) > 1
        shape: dict[str, Any] = {"stages": len(replicas), "replicas": list(replicas) if several else 1}
        if counts:
            shape["partition"] = list(counts)
        return self.model_copy(update={"pipeline": self.pipeline.model_copy(update=shape)})

    @property
    def layout(self) -> Layout:
        stages, replicas = self.pipeline.stages, self.pipeline.replicas
        return _layout(tuple(replicas) if isinstance(replicas, list) else (replicas,) * stages)

    def at(self, stage: int) -> Self:
        """The same where this stage computes."""
        devices = self.runtime.devices
        device = devices[stage] if len(devices) > 1 else devices[0]
        return self.model_copy(update={"runtime": self.runtime.model_copy(update={"device": device})})

    def frozen(self, epoch: int) -> frozenset[int]:
        """The blocks that do not learn in an epoch."""
        tables = (table for table in self.block if epoch >= table.freeze_after_epoch)
        return frozenset(block for table in tables for block in table.blocks)

    def digest(self) -> str:
        """16 hexadecimal digits of everything that all processes of a run must agree on."""
        shared = self.values(MODEL, RESULT, CONDUCT)
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]

    def recipe(self) -> dict[str, Any]:
        """What decides the result of a run, by key; everything else may differ when a run goes on."""
        return self.values(MODEL, RESULT)

    def values(self, *wanted: Effect) -> dict[str, Any]:
        """The plain values of the keys with one of these effects."""
        tree = self.model_dump(mode="json")
        found = ((name, *name.partition("."), effect) for name, effect in effects().items())
        return {
            name: tree[section][key] if key else tree[section]
            for name, section, _, key, effect in found
            if effect in wanted
        }

    def to_toml(self) -> str:
        """The configuration as TOML that `load` reads back to an equal object."""
        try:
            tree = self.model_dump(mode="json")
            return tomli_w.dumps({name: values for name, values in tree.items() if values != []})
        except TypeError as error:
            raise ValueError(
                f"model.args, data.args, loss.args and optimizer.args: {error}; use "
                "numbers, texts, booleans, lists and tables of them"
            ) from None


@cache
def effects() -> dict[str, Effect]:
    """What each ``section.key`` does to the result; "block" is the list of its tables."""
    found: dict[str, FieldInfo] = {}
    for name, section in Config.model_fields.items():
        keys = {f"{name}.{key}": field for key, field in keys_of(name).items()}
        found |= {name: section} if any(isinstance(mark, Effect) for mark in section.metadata) else keys
    return {
        name: next(mark for mark in field.metadata if isinstance(mark, Effect))
        for name, field in found.items()
    }


def keys_of(section: str) -> dict[str, FieldInfo]:
    """The keys of a section, or of each of its tables."""
    kind: Any = Config.model_fields[section].annotation
    [kind] = get_args(kind) or [kind]
    found: dict[str, FieldInfo] = kind.model_fields
    return found


def load(
    path: Path | None = None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Config:
    """Read a TOML file, or start from the embedded defaults.

    `overrides` are ``section.key=value`` texts, whose value is read as TOML, and as plain text if it is none. They win
    over the file, and over both win `values`: ``{"section.key": value}``.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        if path.is_dir():
            raise ValueError(
                f"configuration file {path} is a folder: give a TOML file; a run goes on with --run-dir {path} "
                "--resume auto"
            )
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"configuration file {path} does not exist: check the path") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"configuration file {path} cannot be read as TOML: {error}") from None
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"-o {text!r}: write -o section.key=value, for example -o pipeline.stages=3")
        _put(tree, key.strip(), _value(value.strip()))
    for key, value in (values or {}).items():
        _put(tree, key, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(problem) for problem in error.errors())) from None


def keys_called(name: str) -> list[str]:
    """The ``section.key`` whose last part is this."""
    return [key for key in effects() if key.partition(".")[2] == name]


def _put(tree: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    if not last or (not parents and last not in effects()):
        meant = keys_called(key) or ["pipeline.stages"]
        raise ValueError(f"-o {key}={value}: the key needs a section, for example {' or '.join(meant)}")
    table = tree
    for parent in parents:
        table = table.setdefault(parent, {}) if isinstance(table, dict) else {}
    if isinstance(table, dict):
        table[last] = value


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(problem: Any) -> str:
    """One line for one problem that pydantic found: key, value, fix."""
    if problem["type"] == "value_error":  # of a validator above, which has said all three
        return str(problem["ctx"]["error"])
    path = [part for part in problem["loc"] if isinstance(part, str)]
    value = problem["input"]
    if problem["type"] != "extra_forbidden":
        return f"{'.'.join(path[:2])} = {value!r}: {problem['msg'].lower()}"
    key, names = ".".join(path), list(Config.model_fields)
    known = f"sections are {', '.join(names)}"
    if len(path) > 1:
        known = f"keys of [{path[0]}] are {', '.join(keys_of(path[0]))}"
        names = [*effects(), *(f"{path[0]}.{name}" for name in keys_of(path[0]))]
    meant = keys_called(path[-1]) or difflib.get_close_matches(key, names, 1)
    return f"{key} = {value!r}: unknown key; {f'did you mean {meant[0]}? ' if meant else ''}{known}"
