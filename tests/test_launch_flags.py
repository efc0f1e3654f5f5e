"""The command line: typed overrides, and one clear message with exit status 2 for every mistake."""

import os
import pathlib
import subprocess
import sys

import pytest

from configs import common
from launch import flags
from molora_jax.backbones.compile import compile_losses
from molora_jax.catalogue.surgeries import SURGERIES
from molora_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
MIXLORA = str(ROOT / "configs/mixlora.py")
FLAGS = [("--workdir", dict(required=True)), ("--steps", dict(type=int, default=1))]


def parse(*argv, **keywords):
    return flags.parse("Test.", FLAGS, ["--workdir=w", *argv], **keywords)


def test_overrides_take_the_type_of_the_field():
    config, args = parse(
        f"--config={MIXLORA}",
        "--config.train.steps=7",
        "--config.optim.learning_rate=1",
        "--config.base.source=random:tiny",
        "--config.method.rules.ffn.experts=4",
        "--config.method.rules.ffn.shrink=true",
        "--config.data.system=a, b = c",
        "--config.mesh.data", "-1",
        "--steps=3",
    )  # fmt: skip
    assert config.train.steps == 7 and args.steps == 3 and args.workdir == "w"
    assert type(config.optim.learning_rate) is float and config.optim.learning_rate == 1.0
    assert config.method.rules.ffn.experts == "4" and config.method.rules.ffn.shrink is True
    assert config.data.system == "a, b = c" and config.mesh.data == -1


def test_tuples(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    paths = (str(tmp_path / "one"), str(tmp_path / "two"))
    load = f"--config.method.rules.ffn.load={','.join(paths)}"
    config, _ = parse(f"--config={MIXLORA}", "--config.method.rules.ffn.experts=2", load)
    assert config.method.rules.ffn.load == paths


def test_an_option_that_the_file_leaves_out():
    config, _ = parse(
        f"--config={MIXLORA}", "--config.optim.ratio=4", "--config.optim.name=lora_plus",
        "--config.method.rules.ffn.router.jitter=0.1",
    )  # fmt: skip
    assert config.optim.ratio == 4.0 and config.method.rules.ffn.router.jitter == 0.1


def test_a_router_and_a_start_with_options_that_the_file_leaves_out():
    rule = "--config.method.rules.all"
    routed, _ = parse("--config=lora", f"{rule}.experts=4", f"{rule}.router.k=1", f"{rule}.router.name=softmax_topk")
    assert routed.method.rules.all.router.to_dict() == dict(name="softmax_topk", k=1)
    start = f"{rule}.adapter.init"
    for argv, wanted in (
        (["lora", f"{start}=lora_ga", f"{start}.gamma=4"], dict(name="lora_ga", gamma=4.0)),
        (["lora_ga", f"{start}=pissa"], dict(name="pissa")),
        (["lora_xs", f"{start}.deviation=0.5"], dict(name="lora_xs", deviation=0.5, svd="exact")),
    ):
        config, _ = parse(f"--config={argv[0]}", *argv[1:])
        assert config.method.rules.all.adapter.init.to_dict() == wanted
    with pytest.raises(InputError, match="adapter.init.gama: got an unknown field; .*Did you mean 'gamma'"):
        parse("--config=lora_ga", f"{start}.gama=4")


def test_a_loss_that_the_file_leaves_out_is_switched_on():
    config, _ = parse(
        f"--config={MIXLORA}", "--config.losses.z_loss.weight=0.25", "--config.losses.soft.counts=soft",
        "--config.losses.soft.name=balance",
    )  # fmt: skip
    assert config.losses.z_loss.to_dict() == {"weight": 0.25} and config.losses.balance.counts == "hard"
    assert config.losses.soft.to_dict() == {"counts": "soft", "name": "balance"}
    assert [type(loss).__name__ for _, loss in compile_losses(config)] == ["Balance", "Balance", "ZLoss"]


def test_stages_keep_their_shares_of_the_steps(tmp_path, capsys):
    file = tmp_path / "stages.py"
    file.write_text(
        "from configs import mixlora\n\n\ndef get_config():\n    config = mixlora.get_config()\n"
        "    stage = dict(config.schedule.s00)\n"
        "    config.schedule = dict(s00={**stage, 'steps': 50}, s01={**stage, 'steps': 150})\n    return config\n"
    )
    stages = lambda config: [stage.steps for _, stage in sorted(config.schedule.items())]  # noqa: E731
    assert stages(parse(f"--config={file}")[0]) == [50, 150]
    assert stages(parse(f"--config={file}", "--config.train.steps=8")[0]) == [2, 6]
    assert "50, 150 of 200 steps have 2, 6 of 8" in capsys.readouterr().err
    assert stages(parse(f"--config={file}", "--config.train.steps=3")[0]) == [1, 2]
    own = ["--config.train.steps=3", "--config.schedule.s00.steps=2", "--config.schedule.s01.steps=1"]
    assert stages(parse(f"--config={file}", *own)[0]) == [2, 1], "said on the command line: as it says"
    with pytest.raises(InputError, match="schedule"):
        parse(f"--config={file}", "--config.train.steps=1")


SHIPPED = sorted(file.stem for file in (ROOT / "configs").glob("*.py") if file.stem not in ("__init__", "common"))
SHIPPED = [name for name in SHIPPED if name not in SURGERIES]  # these train nothing


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_fits_three_steps_on_a_random_base(name):
    base = "random:tiny-moe" if name == "moe_lora" else "random:tiny"  # its rule changes experts of the base
    config, _ = parse(f"--config={ROOT}/configs/{name}.py", f"--config.base.source={base}", "--config.train.steps=3")
    assert config.train.steps == 3


def test_a_shared_file_is_not_changed_by_overrides():
    parse(f"--config={MIXLORA}", "--config.train.steps=7")
    assert parse(f"--config={MIXLORA}")[0].train.steps == common.get_config().train.steps


def test_config_may_be_optional_or_come_from_elsewhere():
    assert parse(need_config=False)[0] is None
    config, _ = parse("--config.eval.num_items=4", need_config=False, defaults=lambda args: common.get_config())
    assert config.eval.num_items == 4
    with pytest.raises(InputError):
        parse("--config.eval.num_items=4", need_config=False)


BAD = [
    (["--config.train.step=3"], "config.train.step", "'steps'"),
    (["--config.trian.steps=3"], "config.trian", "'train'"),
    (["--config.train.steps.x=3"], "config.train.steps", "a group"),
    (["--config.train.steps=abc"], "config.train.steps", "an integer"),
    (["--config.train.steps=2.5"], "config.train.steps", "an integer"),
    (["--config.train.steps="], "config.train.steps", "an integer"),
    (["--config.train.steps"], "--config.train.steps", "no value"),
    (["--config.optim.learning_rate=nan"], "config.optim.learning_rate", "a finite number"),
    (["--config.optim.learning_rate=fast"], "config.optim.learning_rate", "a number"),
    (["--config.method.rules.ffn.shrink=maybe"], "config.method.rules.ffn.shrink", "true or false"),
    (["--config.method.rules.ffn=8"], "config.method.rules.ffn", "not a group"),
    (["--config.method.rules.new.experts=8"], "config.method.rules.new", "attn, ffn"),
    (["--config.method.rules.ffn.router.k=9"], "method.rules.ffn.router.k", "K > E"),
    (["--config.losses.z_los.weight=1"], "config.losses.z_los", "Did you mean 'z_loss'?"),
    (["--config.losses.mine.weight=1"], "config.losses.mine", "config.losses.mine.name=package.module:Name"),
    (["--config.losses.z_loss.wieght=1"], "config.losses.z_loss.wieght", "Did you mean 'weight'?"),
    (["--config.losses.z_loss.weight=-1"], "losses.z_loss.weight", ">= 0"),
    (["--config.losses.z_loss=1e-3"], "config.losses.z_loss", "Switch it on by --config.losses.z_loss.weight=1e-3"),
    (["--config.losses.zloss=1e-3"], "config.losses.zloss", "Did you mean 'z_loss'? A loss is switched on by"),
    (["--config.losses=z_loss"], "config.losses", "config.losses.balance"),
    (["--config.surgery.inputs=a,b"], "config.surgery.inputs", "--config.surgery.name too: one of average, lora_lego"),
    (["--config.surgery.name=tis", "--config.surgery.inputs=a"], "config.surgery.name", "Did you mean 'ties'?"),
    (["--config.optim.name=adm", "--config.optim.ratio=2"], "config.optim.name", "Did you mean 'adamw'?"),
    (["--config.surgery=ties"], "config.surgery", "Use config.surgery.name"),
    (["--config.surgery.name=ties", "--config.surgery.rnk=3"], "config.surgery.rnk", "inputs"),
    (["--config.schedule.s00.objective.form=dpo"], "config.schedule.s00.objective.form", "objective.name too: one of"),
    (["--config.schedule.s00.set.seed=1"], "config.schedule.s00.set.seed", "nothing: this group is empty"),
    (["--config..steps=1"], "config.", "an unknown field"),
    (["--wokdir=x"], "--wokdir", "'--workdir'"),
    (["--steps=many"], "command line", "invalid int value"),
    (["stray"], "stray", "an unknown flag"),
]


TWICE = [
    ["--steps=1", "--steps=1"],
    ["--steps", "1", "--steps=2"],
    [f"--config={MIXLORA}"],
    ["--config", MIXLORA],
    ["--workdir=other"],
]


@pytest.mark.parametrize("argv", TWICE, ids=" ".join)
def test_a_flag_given_twice_is_refused(argv):
    with pytest.raises(InputError, match="got 2 times") as caught:
        parse(f"--config={MIXLORA}", *argv)
    assert caught.value.where == argv[0].partition("=")[0]


def test_of_an_override_given_twice_the_last_counts_and_is_named(capsys):
    config, _ = parse(f"--config={MIXLORA}", "--config.train.steps=7", "--config.seed=1", "--config.train.steps", "9")
    assert config.train.steps == 9
    assert capsys.readouterr().err == "note: --config.train.steps is given 2 times; the last counts: 9\n"


def test_a_flag_that_collects_may_be_given_twice():
    both = [*FLAGS, ("--stop", dict(action="append"))]
    _, args = flags.parse("Test.", both, ["--workdir=w", "--stop=a", "--stop=b"], need_config=False)
    assert args.stop == ["a", "b"]


@pytest.mark.parametrize(("argv", "where", "text"), BAD, ids=[argv[0] for argv, *_ in BAD])
def test_wrong(argv, where, text):
    with pytest.raises(InputError) as caught:
        parse(f"--config={MIXLORA}", *argv)
    assert caught.value.where == where
    assert text in str(caught.value)


FILES = [
    ("def get_config(:\n    pass\n", "line 1", "def get_config(:"),
    ("x = 1\n", "--config", "without get_config"),
    ("def get_config():\n    return 3\n", "--config", "a ConfigDict"),
    ("import configs.comon\n", "line 1", "ModuleNotFoundError"),
    ("from configs import common\n\n\ndef get_config():\n    return common.get_confg()\n", "line 5", "AttributeError"),
    ("from configs import mixlora\n\n\ndef get_config():\n    c = mixlora.get_config()\n    c.train.step = 3\n"
     "    return c\n", "train.step", "'steps'"),
    ("from configs import mixlora\n\n\ndef get_config():\n    c = mixlora.get_config()\n    c.train.steps = 'x'\n"
     "    return c\n", "line 6", "TypeError"),
    ("raise SystemExit(5)\n", "line 1", "SystemExit"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "where", "message"), FILES, ids=[m for *_, m in FILES])
def test_wrong_config_file(tmp_path, text, where, message):
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        parse(f"--config={file}")
    assert where in caught.value.where
    assert message in str(caught.value)
    assert not (tmp_path / "__pycache__").exists()


def test_missing_config_file():
    with pytest.raises(InputError) as caught:
        parse(f"--config={ROOT / 'configs/mixlra.py'}")
    assert "mixlora.py" in str(caught.value)


LAUNCHER = """
import sys
from launch import flags

def main(argv):
    config, args = flags.parse("Says the steps.", [("--workdir", dict(required=True))], argv)
    if args.workdir == "stop":
        raise KeyboardInterrupt
    print(config.train.steps, "jax" in sys.modules)

flags.main(main)
"""


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        ([f"--config={MIXLORA}", "--workdir=w", "--config.train.steps=5"], 0, "5 False"),
        ([f"--config={MIXLORA}", "--workdir=stop"], 130, "interrupted"),
        ([f"--config={MIXLORA}", "--workdir=w", "--config.train.stepz=5"], 2, "Did you mean 'steps'?"),
        ([f"--config={MIXLORA}"], 2, "--workdir"),
        (["--workdir=w"], 2, "--config"),
        (["--config=absent.py", "--workdir=w"], 2, "no such file"),
        (["--help"], 0, "--config.a.b=value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_exit_status(argv, status, text):
    run = subprocess.run([sys.executable, "-c", LAUNCHER, *argv], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == status, run.stderr
    assert text in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    if status == 2:
        assert run.stderr.startswith("error: ") and not run.stdout


FAULTS = """
import os, resource, sys
from molora_jax import runtime

runtime.keep_memory()
with open("starts", "a") as starts:
    starts.write(f"{os.getpid()}\\n")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt  # page faults
for _ in range(2):  # as two steps that need the same memory
    before, size = faults(), 64 << 20
    block = bytearray(size)
    block[:] = b"x" * size
    del block
print(faults() - before, [name for name in os.environ if "KEEP_MEMORY" in name or "GLIBC" in name], sys.argv[1:])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc")
@pytest.mark.parametrize("wanted", ["1", "0"])
def test_a_launcher_keeps_memory_between_steps(tmp_path, wanted):
    script = tmp_path / "script.py"
    script.write_text(FAULTS)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOLORA_KEEP_MEMORY": wanted, "PYTHONPATH": str(ROOT)}
    environment.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, str(script), "an argument"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True)
    faults, rest = run.stdout.split(maxsplit=1)
    if wanted == "1":
        assert int(faults) < 100
        assert rest.strip() == "[] ['an argument']"  # children start as the user has it
    else:
        assert int(faults) > 1000
    assert len((tmp_path / "starts").read_text().split()) == 1


def test_a_surgery_may_be_named_by_flags():
    named = ["--config.surgery.name=average", "--config.surgery.inputs=a,b@3", "--config.surgery.of=product"]
    config, _ = parse(f"--config={MIXLORA}", *named)
    assert config.surgery.to_dict() == {"name": "average", "inputs": ("a", "b@3"), "of": "product"}


def test_a_mesh_on_the_command_line():
    assert flags.mesh("fsdp:4,tensor:2") == {"fsdp": 4, "tensor": 2} and flags.mesh(None) is None
    for text in ("fsdp", "fsdp:x", "fsdp:2,fsdp:4", "", ":2", "fsdp:-1"):
        with pytest.raises(InputError, match="--mesh"):
            flags.mesh(text)
