"""What the whole suite shares: the shipped model, a folder of drawn clips, and a configuration of a few seconds."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

# One thread each: bits do not depend on the machine's cores, and parallel workers do not get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait by spinning take the core from the one they wait for: a step took 51 s where it takes 2.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Some virtual machines list AMX and do not grant it: attention in bf16 then dies of an illegal instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
if "PYTEST_XDIST_WORKER" not in os.environ:  # what is remembered of videos and weights: the suite's, its workers' too
    CACHE = tempfile.TemporaryDirectory(prefix="alignkit-cache-")
    os.environ["XDG_CACHE_HOME"] = CACHE.name

import pytest
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))  # modules beside the tests can be imported by them
from starting import LAUNCHER, forget_garbage, fresh_environment, import_everything  # noqa: E402

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "wan-tiny-localdpo.yaml"
COGVIDEOX_KINDS = {  # sin-cos positions and rotary ones
    "2b": {"use_rotary_positional_embeddings": False},
    "5b": {"use_rotary_positional_embeddings": True},
}
COGVIDEOX_TEXT_LENGTH = 24
NUM_CLIPS = 10
SMALL = (
    "data.height=32",
    "data.width=32",
    "data.num_frames=9",
    "pairs.num_inference_steps=4",
    "pairs.strengths=[3]",
    "pairs.block_size=4",
    "pairs.batch_size=4",
    "train.steps=6",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.checkpoint_every=2",
    "sample.num_inference_steps=4",
    "sample.count=2",
    "sample.seeds=[0]",
    "sample.batch_size=2",
    "evaluation.positions=[0.5]",
    # The published loss and masks and a small rate, not what the demo takes: bounds in tests are derived for these.
    "objective={}",
    "pairs.mask={}",
    "pairs.guidance_scale=4.0",
    "train.learning_rate=3e-6",
)


MANY = 1000
LONGEST = "test_verdicts", "test_interpreter", "test_campaign", "test_compiled", "test_rounds", "test_shipped"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then training's: one of minutes that begins last keeps its worker busy alone."""
    items.sort(key=lambda item: (item.path.stem not in LONGEST, "training" not in item.path.parts))


def pytest_collection_finish(session: pytest.Session) -> None:
    if len(session.items) >= MANY:  # which will need it all
        import_everything()
    forget_garbage()


@pytest.fixture(autouse=True)
def process_wide_changes_undone():
    """What a training run changes for its whole process, and the next test, or a process it starts, must not inherit.

    ZeRO-3 replaces `F.linear`, with other rounding; training takes as many threads as there are cores, and bits may
    depend on them; joining a process group alone writes the launcher's variables.
    """
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear
    torch.set_num_threads(1)
    for name in LAUNCHER:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder of ten drawn clips with captions."""
    from alignkit.tiny.clips import write_clips

    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, NUM_CLIPS, seed=99)
    return folder


@pytest.fixture(scope="session")
def half_base(tmp_path_factory) -> Path:
    """The shipped base with half of its blocks."""
    from halved import halve

    return halve("wan", tmp_path_factory.mktemp("base") / "wan")


@pytest.fixture(scope="session")
def base_weights(half_base) -> dict[str, torch.Tensor]:
    """Of its transformer."""
    from safetensors.torch import load_file

    return load_file(next(half_base.glob("transformer/*.safetensors")))


@pytest.fixture(scope="session")
def overrides(clips, half_base) -> Callable[..., list[str]]:
    """`overrides(out, "train.steps=3")`: the demo's configuration cut down to seconds, written under `out`."""
    own = f"data.videos={clips}", f"model.path={half_base}"
    return lambda out, *more: [*own, f"output.dir={out}", *SMALL, *more]


@pytest.fixture
def small_config(overrides, tmp_path):
    """`small_config("train.steps=3")`: a loaded configuration of a few seconds under tmp_path / "run"."""
    from alignkit.config import load_config

    return lambda *more: load_config(CONFIG, overrides(tmp_path / "run", *more))


@pytest.fixture(scope="session")
def made_pairs(overrides, tmp_path_factory) -> Path:
    """A run folder that holds pairs made by the shipped base: 8 to train on, 2 held out."""
    from alignkit.config import load_config
    from alignkit.localdpo.build import build_pairs

    out = tmp_path_factory.mktemp("made") / "run"
    build_pairs(load_config(CONFIG, overrides(out)), torch.device("cpu"))
    return out


@pytest.fixture
def run_with_pairs(made_pairs, overrides, tmp_path):
    """`run_with_pairs("name", "train.steps=3")`: (config, overrides) of a run of its own that starts with the pairs."""
    from alignkit.config import load_config

    def prepare(name: str = "run", *more: str):
        out = tmp_path / name
        shutil.copytree(made_pairs, out)
        settings = overrides(out, *more)
        return load_config(CONFIG, settings), settings

    return prepare


PROMPTS = (
    "a red circle moves left on a plain background",
    "a blue square moves up on a striped background",
    "a green triangle moves right on a plain background",
)
ROLLOUTS = (
    "rollout.num_inference_steps=6",
    "rollout.solver=first_order",
    "rollout.per_prompt=3",
    "rollout.negative_prompt=blurred",
    "rollout.batch_size=2",
    "rollout.block_size=4",
    "rollout.previews=1",
    "noise.source=path",
    "noise.path_between=true",
    "noise.path_steps=3",
    "noise.timesteps=schedule",
    "objective.name=dpo",
)
RANKING = ((0, 1), (2, 1), (3, 5), (4, 3), (6, 7), (8, 7))  # of nine rollouts of three prompts, the better one first


@pytest.fixture(scope="session")
def rollout_overrides(overrides, tmp_path_factory) -> Callable[..., list[str]]:
    """`rollout_overrides(out, "rollout.seed=1")`: nine rollouts with states of their paths, in seconds."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    rows = [json.dumps({"chosen": better, "rejected": worse}) for better, worse in RANKING]
    (folder / "ranking.jsonl").write_text("\n".join(rows))
    files = f"data.prompts={folder / 'prompts.txt'}", f"data.pairs={folder / 'ranking.jsonl'}"

    def make(out, *more):
        own = [*files, f"data.rollouts={out / 'rollouts'}", "data.heldout=0.3", *ROLLOUTS]
        return [*overrides(out)[1:], *own, *more]  # without data.videos, the first

    return make


@pytest.fixture(scope="session")
def made_rollouts(rollout_overrides, tmp_path_factory) -> Path:
    """A run folder with rollouts by the shipped base, and pairs of them: 4 to train on, 2 held out."""
    from alignkit.apo.pairs import build_rollout_pairs
    from alignkit.apo.rollouts import build_rollouts
    from alignkit.config import load_config

    out = tmp_path_factory.mktemp("apo") / "run"
    config = load_config(CONFIG, rollout_overrides(out))
    build_rollouts(config, torch.device("cpu"), show=False)
    build_rollout_pairs(config, torch.device("cpu"), show=False)
    return out


class Command:
    """A command that was forked from a process that has imported everything; as `subprocess.Popen` has it."""

    def __init__(self, server: "Server", argv: list[str], code: str | None, environment: dict[str, str]):
        self._server, self.returncode = server, None
        self._out, self._err = (server.folder / f"{name}-{next(server.numbers)}" for name in ("out", "err"))
        job = {"argv": argv, "code": code, "env": environment, "out": str(self._out), "err": str(self._err)}
        self.pid = int(server.ask(job))

    def poll(self) -> int | None:
        if self.returncode is None:
            answer = self._server.ask({"poll": self.pid})
            self.returncode = int(answer) if answer else None
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired("a command", timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(file.read_text() if file.exists() else "" for file in (self._out, self._err))

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that commands are forked from (tests/starting.py), started when the first one is."""

    def __init__(self, folder: Path, *arguments: str):
        self.folder, self.arguments, self.numbers, self._process = folder, arguments, itertools.count(), None
        self._asking = threading.Lock()

    def ask(self, job: dict) -> str:
        with self._asking:
            if self._process is None:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                command = [sys.executable, str(Path(__file__).with_name("starting.py")), *self.arguments]
                self._process = subprocess.Popen(command, text=True, env=fresh_environment(), **pipes)
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline().strip()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("forked"))
    yield found
    found.stop()


ASKS = """
import json, os, sys, time, uuid
asked = os.path.join(os.environ["ALIGNKIT_ASKED"], uuid.uuid4().hex)
with open(asked, "w") as file:
    json.dump({"argv": sys.argv[1:], "env": dict(os.environ)}, file)
os.rename(asked, asked + ".job")
while not os.path.exists(asked + ".done"):
    time.sleep(0.01)
with open(asked + ".done") as file:
    code, out, err = json.load(file)
sys.stdout.write(out), sys.stderr.write(err)
sys.exit(code)
"""


@pytest.fixture
def stand_in(server, tmp_path):
    """Variables under which launchers' own `python -m alignkit` is forked, too, from the process that has imported
    everything, with the variables that the launcher gives it. Not where alignkit itself is found: beside `-m`, the
    folder that one is in comes first."""
    package, folder = tmp_path / "stand-in" / "alignkit", tmp_path / "asked"
    package.mkdir(parents=True), folder.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(ASKS)
    running: dict[Path, Command] = {}
    over = threading.Event()

    def done(file: Path, *answer) -> None:
        (folder / "partial").write_text(json.dumps(answer))
        (folder / "partial").rename(file.with_suffix(".done"))

    def answer() -> None:
        while not over.wait(0.02):
            for file in folder.glob("*.job"):
                job = json.loads(file.read_text())
                file.rename(file.with_suffix(".taken"))
                try:
                    running[file] = Command(server, ["alignkit", *job["argv"]], None, job["env"])
                except Exception as error:  # the thread's own end would leave the launcher waiting
                    done(file, 1, "", repr(error))
            for file in [file for file, child in running.items() if child.poll() is not None]:
                child = running.pop(file)
                done(file, child.returncode, *child.communicate())

    thread = threading.Thread(target=answer)
    thread.start()
    yield {"PYTHONPATH": f"{package.parent}:{os.environ.get('PYTHONPATH', '')}", "ALIGNKIT_ASKED": str(folder)}
    over.set()
    thread.join()
    for child in running.values():
        child.kill()


@pytest.fixture(scope="session")
def plain_diffusers(tmp_path_factory):
    """`plain_diffusers(code, *argv)` runs it in a process that has never heard of alignkit; returns what it printed."""
    server = Server(tmp_path_factory.mktemp("plain"), "plain")

    def run(code: str, *arguments) -> str:
        child = Command(server, ["-c", *map(str, arguments)], code, fresh_environment())
        out, err = child.communicate()
        assert child.returncode == 0, err[-2000:]
        return out

    yield run
    server.stop()


@pytest.fixture(scope="session")
def wan():
    """The shipped small Wan2.1, all parts."""
    from alignkit.config import ModelSection
    from alignkit.models import load_model

    return load_model(ModelSection(path="tiny", max_sequence_length=64))


@pytest.fixture(scope="session")
def half_wan(half_base):
    """What the runs of `overrides` train, all parts."""
    from alignkit.config import ModelSection
    from alignkit.models import load_model

    return load_model(ModelSection(path=str(half_base), max_sequence_length=64))


@pytest.fixture(scope="session")
def command(start_command):
    """`command("train", CONFIG, ...)` runs the alignkit command line in a process of its own, `python=("-c", CODE)`
    other code; returns exit code, output and errors. fresh: with nothing imported before."""

    def run(*arguments, python: tuple[str, ...] = ("-m", "alignkit"), fresh: bool = False):
        words = [str(word) for word in arguments]
        if fresh or not (python[:1] == ("-c",) or python == ("-m", "alignkit")):
            whole = [sys.executable, *python, *words]
            return subprocess.run(
                whole, capture_output=True, text=True, timeout=300, env=fresh_environment(), check=False
            )
        child = start_command(*words, code=python[1] if python[0] == "-c" else None)
        out, err = child.communicate()
        return subprocess.CompletedProcess(words, child.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def start_command(server):
    """`start_command("train", CONFIG, ...)` starts the command line, or other `code`, and returns it as Popen would.

    env: variables to be set. fresh: with nothing imported before."""

    def start(*arguments, code: str | None = None, env: dict[str, str] | None = None, fresh: bool = False):
        words, environment = [str(word) for word in arguments], fresh_environment() | (env or {})
        if fresh:
            whole = [sys.executable, "-m", "alignkit", *words]
            return subprocess.Popen(whole, stderr=subprocess.PIPE, text=True, env=environment)
        return Command(server, ["alignkit" if code is None else "-c", *words], code, environment)

    return start


@pytest.fixture(scope="session")
def config_file() -> Path:
    return CONFIG


@pytest.fixture(scope="session")
def build_cogvideox():
    """`build_cogvideox(folder, kind)` writes a CogVideoXPipeline of some thousand random weights."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    def build(folder, kind, **scheduler):
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4, sample_frames=9,
            max_text_seq_length=COGVIDEOX_TEXT_LENGTH, **COGVIDEOX_KINDS[kind],
        )  # fmt: skip
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(4, 4, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            sample_height=16, sample_width=16, scaling_factor=0.7,
        )  # fmt: skip
        text = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        settings = {
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
            "snr_shift_scale": 3.0 if kind == "2b" else 1.0,
        } | scheduler  # fmt: skip
        CogVideoXPipeline(
            tokenizer=ByT5Tokenizer(), text_encoder=T5EncoderModel(text), vae=vae, transformer=transformer,
            scheduler=CogVideoXDDIMScheduler(**settings),
        ).save_pretrained(folder)  # fmt: skip
        return folder

    return build


@pytest.fixture(scope="session")
def cogvideox_folders(build_cogvideox, tmp_path_factory):
    """Folder by kind."""
    root = tmp_path_factory.mktemp("cogvideox")
    return {kind: build_cogvideox(root / kind, kind) for kind in COGVIDEOX_KINDS}


BOUNDARY = 0.8  # of four steps at a flow shift of 3 two are on each side: 999, 900; 750, 500


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory) -> Path:
    """A WanPipeline of two networks of one layer and random weights; all else is the shipped small one's."""
    from alignkit.models import family_module, shipped_model

    folder, shipped = tmp_path_factory.mktemp("experts") / "model", shipped_model("wan")
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("transformer"))
    config = json.loads((shipped / "transformer/config.json").read_text()) | {"num_layers": 1}
    for seed, part in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(seed)
        family_module("wan").build_transformer(config).save_pretrained(folder / part)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"boundary_ratio": BOUNDARY, "transformer_2": index["transformer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
