from __future__ import annotations

from pathlib import Path

import pytest

from scpl_dist.run.config import Config, Effect, effects, load


def test_the_resolved_file_reads_back_to_the_same_configuration(tmp_path: Path) -> None:
    config = load(
        None, ["pipeline.partition=[1, 3]", "model.args.width=8", 'data.root="a b"', "optimizer.lr=3e-4"]
    )
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert load(path) == config


def test_an_argument_that_no_file_can_hold_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.args.*NoneType.*use numbers, texts"):
        load(values={"model.args": {"width": None}}).to_toml()


def test_overrides_win_over_the_file_and_values_over_both(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[run]\nseed = 1\nepochs = 2\n")
    config = load(path, ["run.seed=3"], {"run.epochs": 4})
    assert (config.run.seed, config.run.epochs) == (3, 4)


def test_plain_text_needs_no_quotes() -> None:
    assert load(None, ["run.method=bp"]).run.method == "bp"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pipeline.stagse=2", r"did you mean pipeline.stages\? keys of \[pipeline\] are stages"),
        ("model.epochs=2", r"model.epochs = 2: unknown key; did you mean run.epochs\?"),
        ("epochs=2", "-o epochs=2: the key needs a section, for example run.epochs"),
        ("pipelin.stages=2", r"unknown key; did you mean pipeline\? sections are run, model"),
        ("pipeline.stages=0", "pipeline.stages = 0: input should be greater than 0"),
        ("pipeline.stages=two", "pipeline.stages = 'two': input should be a valid integer"),
        ("optimizer.lr=-0.1", "optimizer.lr = -0.1: input should be greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr = nan: input should be"),
        ("data.augmentation=blur", "data.augmentation = 'blur': input should be 'none', 'basic' or 'strong'"),
        ("pipeline.partition=[1, 2, 3]", "has 3 entries for pipeline.stages = 2"),
        (
            "pipeline.partition=3",
            "pipeline.partition = 3: input should be 'uniform', 'parameters' or 'measured'",
        ),
        ("pipeline.partition=3", "pipeline.partition = 3: input should be a valid list"),
        ("pipeline.replicas=two", "pipeline.replicas = 'two': input should be a valid integer"),
        ("pipeline.replicas=[1, 0]", "pipeline.replicas = 0: input should be greater than 0"),
        ("optimizer.end_lr=1.0", "the schedule can only fall"),
        ("optimizer.args.lr=0.1", "the learning rate has a key of its own; set optimizer.lr"),
        ("optimizer.ema=1.0", "optimizer.ema = 1.0: input should be less than 1"),
        ("runtime.precision=half", "runtime.precision = 'half': input should be 'float32', 'bfloat16' or"),
        ("stages=2", "the key needs a section"),
        ("pipeline.stages", "write -o section.key=value"),
        ("task.class_weights=[1.0, 0.0]", "task.class_weights = 0.0: input should be greater than 0"),
        ("task.class_weights=even", "task.class_weights = 'even': input should be 'none' or 'balanced'"),
        ("block=[{freeze = true}]", "block.index = .*field required"),
        (
            "block=[{index = 0, freez = true}]",
            r"block.freez = True: unknown key; did you mean block.freeze\?",
        ),
        (
            "block=[{index = -1, freeze = true}]",
            "block.index = -1: input should be greater than or equal to 0",
        ),
        ("block=[{index = 1}]", "block.index = 1: its table changes nothing; set block.freeze"),
        ("block.freeze=true", "block = .*: input should be a valid list"),
        ("metrics.port=70000", "metrics.port = 70000: input should be less than or equal to 65535"),
    ],
)
def test_a_mistake_is_answered_with_key_value_and_fix(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(None, [override])


def test_two_ways_to_clip_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clip_norm = 1.0 and optimizer.clip_value = 2.0: use one of them"):
        load(values={"optimizer.clip_norm": 1.0, "optimizer.clip_value": 2.0})


def test_a_batch_whose_answers_fill_more_than_a_message_is_refused() -> None:
    with pytest.raises(ValueError, match="macro_f1 takes batches of at most 60000 samples"):
        load(values={"task.metrics": ["macro_f1"], "data.batch_size": 60_001})


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    with pytest.raises(ValueError, match=r"broken\.toml cannot be read as TOML"):
        load(broken)


def test_tables_of_blocks_say_what_is_frozen_in_an_epoch(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        "[[block]]\nindex = [0, 2]\nfreeze = true\n[[block]]\nindex = 1\nfreeze_after_epoch = 3\n"
    )
    config = load(file)
    assert [config.frozen(epoch) for epoch in (0, 2, 3, 9)] == [{0, 2}, {0, 2}, {0, 1, 2}, {0, 1, 2}]
    file.write_text(config.to_toml())
    assert load(file) == config
    assert load(file, ["block=[]"]) == Config()
    assert config.digest() != Config().digest()
    assert Config().frozen(5) == set()


def test_the_digest_covers_what_all_processes_share_and_nothing_else() -> None:
    base = Config().digest()
    assert load(None, ["run.seed=1"]).digest() != base
    assert load(None, ["checkpoint.keep=9"]).digest() != base
    assert load(None, ["metrics.port=0", "control.port=5000"]).digest() == base


def test_every_key_says_what_it_does_to_the_result() -> None:
    tree = Config().model_dump() | {"block": {"": "a list of tables"}}
    keys = [f"{section}.{key}".removesuffix(".") for section in tree for key in tree[section]]
    assert list(effects()) == keys
    shaping = {key for key, effect in effects().items() if effect in (Effect.MODEL, Effect.RESULT)}
    assert Config().recipe().keys() == shaping


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["runtime.compile=reduce-overhead", "pipeline.recompute=true"],
            r'runtime.compile = "reduce-overhead" and pipeline.recompute',
        ),
        (
            ["runtime.compile=true", "pipeline.replicas=2"],
            r"runtime.compile = true and pipeline.replicas = 2",
        ),
        (
            ["block=[{index = 1, freeze = true, freeze_after_epoch = 2}]"],
            "block.freeze = true and block.freeze_after_epoch = 2, of block.index = 1: use one",
        ),
        (
            ["block=[{index = [0, 1], freeze = true}, {index = 1, freeze_after_epoch = 2}]"],
            "block.index = 1 is there twice",
        ),
        (["runtime.tf32=true", "runtime.device=cpu"], r'runtime.tf32 = true and runtime.device = "cpu"'),
        (['runtime.device=["cpu"]'], r"runtime.device = \['cpu'\] has 1 entries for pipeline.stages = 2"),
        (
            ['runtime.device=["cpu", "cuda:1"]', "pipeline.transport=nccl"],
            r"pipeline.transport = \"nccl\" and runtime.device = \['cpu', 'cuda:1'\]: it is between GPUs",
        ),
        (
            ['runtime.device=["cpu", "cuda:1"]', "pipeline.elastic=[1, 2]"],
            r"runtime.device = \['cpu', 'cuda:1'\] and pipeline.elastic = \[1, 2\]",
        ),
        (
            ['runtime.device=["cpu", "cuda:1"]', "pipeline.partition=measured"],
            r"runtime.device = \['cpu', 'cuda:1'\] and pipeline.partition = \"measured\": .* one device",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(None, overrides)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "CPU", "mps"])
def test_a_device_that_is_none_is_refused_with_those_that_are(device: str) -> None:
    for given in (device, ["cpu", device]):
        with pytest.raises(
            ValueError, match=rf"runtime.device = .*: '{device}' is none; use auto, cpu, cuda"
        ):
            load(values={"runtime.device": given})


def test_a_list_has_a_device_for_each_stage_and_goes_through_a_file(tmp_path: Path) -> None:
    config = load(values={"runtime.device": ["cpu", "cuda:1"]})
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert load(tmp_path / "config.toml") == config
    assert [config.at(stage).runtime.device for stage in (0, 1)] == ["cpu", "cuda:1"]
    assert [load(None, ["runtime.device=cuda"]).at(stage).runtime.device for stage in (0, 1)] == ["cuda"] * 2
