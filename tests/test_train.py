"""scripts/train.py: packing, the model's rotary embeddings, and whole runs on several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from rank_pool import RankPool

pytest.importorskip("matplotlib", reason="scripts/train.py draws its losses")
pytest.importorskip("tqdm", reason="scripts/train.py shows its progress")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import model as model_script  # noqa: E402
import ranks as ranks_script  # noqa: E402
import ringflex as rf  # noqa: E402
import train as train_script  # noqa: E402
from data import IGNORE_LABEL, PackedDocuments, standard_library_documents  # noqa: E402
from model import Execution, ModelConfig, Transformer, rotary_angles, rotate  # noqa: E402

DOCUMENTS = [b"abcdefgh", b"ijk", b"l", b"mnopqrstuvwxyz0123456789", b"ABCD"]  # all bytes differ
TINY = ("--layers", "2", "--dim", "32", "--heads", "4", "--kv-heads", "2", "--window", "200")


# Packing


def stream(packed: PackedDocuments, sequences: int) -> bytes:
    return b"".join(bytes(packed.sequence(i)[0].tolist()) for i in range(sequences))


@pytest.mark.parametrize("seq_len", [2, 8, 20, 40, 80])
def test_an_epoch_holds_every_document_once(seq_len):
    packed = PackedDocuments(DOCUMENTS, seq_len=seq_len, seed=3)
    total = packed.epoch_tokens
    assert total == sum(map(len, DOCUMENTS)) == 40
    text = stream(packed, 2 * total // seq_len)
    for epoch in (text[:total], text[total:]):
        assert all(document in epoch for document in DOCUMENTS)  # whole: 40 bytes, so each once


def test_epochs_meet_inside_a_sequence():
    text = stream(PackedDocuments(DOCUMENTS, seq_len=7, seed=0), 12)
    assert all(document in text[:40] and document in text[40:80] for document in DOCUMENTS)


def test_the_seed_and_the_epoch_decide_the_order():
    first, again, other = (
        stream(PackedDocuments(DOCUMENTS, seq_len=40, seed=seed), 2) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert first[:40] != first[40:]


@pytest.mark.parametrize("seq_len", [2, 9, 64])
def test_labels_are_the_next_byte_of_the_same_document(seq_len):
    packed = PackedDocuments(DOCUMENTS, seq_len=seq_len, seed=1)
    for step in range(8):
        batch = packed.batch(step=step, batch_size=3)
        for row in range(3):
            tokens, ids, labels = (x[row].tolist() for x in vars(batch).values())
            assert ids[0] == 0
            for i in range(seq_len):
                follows = i + 1 < seq_len and ids[i + 1] == ids[i]
                assert labels[i] == (tokens[i + 1] if follows else IGNORE_LABEL)
                # No two bytes of DOCUMENTS are equal, so the bytes tell where a document ends.
                pair = bytes(tokens[i : i + 2])
                assert follows == (len(pair) == 2 and any(pair in d for d in DOCUMENTS))


@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
def test_data_parallel_ranks_share_one_global_batch(dp_size):
    packed = PackedDocuments(DOCUMENTS, seq_len=16, seed=0)
    whole = packed.batch(step=5, batch_size=6)
    shares = [
        packed.batch(step=5, batch_size=6, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)
    ]
    for name in ("tokens", "doc_ids", "labels"):
        assert torch.equal(torch.cat([getattr(s, name) for s in shares]), getattr(whole, name))
    assert torch.equal(packed.batch(step=10, batch_size=3).tokens, whole.tokens[:3])


def test_packing_refuses_bad_arguments():
    with pytest.raises(ValueError, match="got 0 of which 0 are empty"):
        PackedDocuments([], seq_len=8, seed=0)
    with pytest.raises(ValueError, match="got 2 of which 1 are empty"):
        PackedDocuments([b"a", b""], seq_len=8, seed=0)
    with pytest.raises(ValueError, match="seq_len=1 leaves nothing to predict"):
        PackedDocuments([b"a"], seq_len=1, seed=0)
    packed = PackedDocuments(DOCUMENTS, seq_len=8, seed=0)
    with pytest.raises(ValueError, match="batch_size=3 sequences do not divide among dp_size=2"):
        packed.batch(step=0, batch_size=3, dp_size=2)
    with pytest.raises(ValueError, match="dp_rank=2 is not in"):
        packed.batch(step=0, batch_size=2, dp_rank=2, dp_size=2)
    with pytest.raises(ValueError, match="step=-1 is negative"):
        packed.batch(step=-1, batch_size=2)


def test_documents_are_the_standard_library():
    documents = standard_library_documents()
    assert Path(dataclasses.__file__).read_bytes() in documents
    assert Path(torch.__file__).read_bytes() not in documents  # lives in site-packages
    assert sum(map(len, documents)) > 100 * 8192


# The model


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    scores = []
    for q_idx, kv_idx in ((5, 2), (8003, 8000), (5, 5)):
        cos, sin = rotary_angles(torch.tensor([q_idx, kv_idx]), head_dim=16, base=1e4)
        turned_q, turned_k = rotate(q, cos[:1], sin[:1]), rotate(k, cos[1:], sin[1:])
        scores.append(float((turned_q * turned_k).sum()))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[0] != pytest.approx(scores[2], abs=1e-2)
    assert scores[2] == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_model_refuses_sizes_that_do_not_fit():
    sizes = {"vocab_size": 256, "dim": 64, "layers": 1, "heads": 4, "kv_heads": 2}
    with pytest.raises(ValueError, match="dim=60 does not split into heads=4 of an even size"):
        ModelConfig(**{**sizes, "dim": 60})
    with pytest.raises(ValueError, match="heads=4 do not share kv_heads=3 evenly"):
        ModelConfig(**{**sizes, "kv_heads": 3})
    with pytest.raises(ValueError, match="layers=0 must be at least 1"):
        ModelConfig(**{**sizes, "layers": 0})


def saved_bytes_and_gradients(
    model: Transformer, plan: rf.Plan, tokens: Tensor
) -> tuple[int, list[Tensor | None]]:
    """Bytes that autograd keeps from the forward for the backward, and what the backward makes."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = model(tokens, torch.arange(tokens.shape[1]), {"local": plan, "global": plan})
    logits.square().mean().backward()
    return sum(kept.values()), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_blocks_keep_less_and_compute_the_same(monkeypatch, compiled):
    # As torch.compile does by default, but for the code that is made of the graphs.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    attention, calls = rf.flex_attention, []
    monkeypatch.setattr(rf, "flex_attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    config = ModelConfig(vocab_size=256, dim=32, layers=2, heads=4, kv_heads=2)
    models = [
        Transformer(config, Execution(compile=compiled, checkpoint_activations=True)),
        Transformer(config),
    ]
    models[0].load_state_dict(models[1].state_dict())
    plan = rf.plan_all(rf.causal(), seq_len=256, world_size=1)[0]
    tokens = torch.randint(0, 256, (2, 256))
    (kept, found), (kept_plainly, wanted) = (
        saved_bytes_and_gradients(model, plan, tokens) for model in models
    )
    torch.testing.assert_close(found, wanted)
    assert len(calls) == 2 * config.layers  # attention is not recomputed
    assert kept < 0.6 * kept_plainly


# Settings


def test_settings_that_contradict_are_refused(monkeypatch, tmp_path):
    parse = train_script.parse_config
    with pytest.raises(ValueError, match="--check needs fp32"):
        parse(["--check", "--dtype", "bf16"])
    assert parse(["--check", "--dtype", "bf16", "--check-tolerance", "0.1"]).check_tolerance == 0.1
    with pytest.raises(ValueError, match="--check starts from step 0"):
        parse(["--check", "--resume"])
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        parse(["--window", "0"])

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="dp=2 does not divide the 1 ranks"):
        train_script.start(parse(["--dp", "2"]))
    with pytest.raises(ValueError, match="--check compares with one rank"):
        train_script.start(parse(["--check"]))

    folder = tmp_path / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    with pytest.raises(ValueError, match="is from an earlier run"):
        train_script.start(parse(["--out", str(tmp_path), "--checkpoint-every", "4"]))


def test_the_device_decides_what_the_command_line_leaves_open():
    names = ("fsdp", "compile", "checkpoint_activations")

    def settings(device: str, *arguments: str) -> list[bool]:
        config = train_script.parse_config([*arguments]).on(torch.device(device))
        return [getattr(config, name) for name in names]

    assert settings("cpu") == [False, False, False]
    assert settings("cuda") == [True, True, True]
    assert settings("cuda", "--no-compile", "--fsdp") == [True, False, True]
    assert settings("cpu", "--fsdp", "--checkpoint-activations") == [True, False, True]


def test_resume_refuses_other_settings_and_missing_checkpoints(tmp_path):
    config = train_script.parse_config(["--out", str(tmp_path)])
    nothing: Any = None  # refused before the model is touched
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        train_script.load_checkpoint(config, nothing, nothing, nothing)

    folder = tmp_path / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (folder / "losses.json").write_text(json.dumps({"config": vars(config)}))
    with pytest.raises(ValueError, match=r"lr=0\.5, but .* was trained with lr=0\.003"):
        train_script.load_checkpoint(replace(config, lr=0.5), nothing, nothing, nothing)


def test_check_judges_every_step():
    one = [4.0, 3.0, 2.0]
    assert train_script.report_check(one, [4.0, 3.00002, 2.0], tolerance=1e-5)
    assert not train_script.report_check(one, [4.0, 3.00004, 2.0], tolerance=1e-5)


# Whole runs


def launch(
    out: Path,
    *arguments: str,
    ranks: int | None = None,
    fails: bool = False,
    on_gpus: bool = False,
) -> str:
    """Run scripts/train.py on `ranks` processes, or without a launcher; what it printed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks else ()), str(SCRIPTS / "train.py")]
    command += [*TINY, "--out", str(out), *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if not on_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on to its ranks
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"{' '.join(command)} ran past 200 s:\n{output}")
    assert (process.returncode != 0) == fails, output
    return output


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "losses.json").read_text())


@pytest.mark.parametrize(
    ("steps", "ranks", "arguments"),
    [
        pytest.param(50, 2, ("--seq-len", "1100"), id="cp2-padded"),
        pytest.param(25, 4, ("--seq-len", "1024"), id="cp4"),
        pytest.param(25, 4, ("--seq-len", "600", "--dp", "2", "--batch-size", "4"), id="dp2xcp2"),
        pytest.param(10, 2, ("--seq-len", "1100", "--strategy", "ulysses"), id="ulysses2"),
    ],
)
def test_steps_have_the_losses_of_one_process(tmp_path, steps, ranks, arguments):
    output = launch(tmp_path, "--check", "--steps", str(steps), *arguments, ranks=ranks)
    assert f"check passed: {steps} steps" in output
    saved = result(tmp_path)
    assert (saved["dp"], saved["cp"]) == ((2, 2) if "--dp" in arguments else (1, ranks))
    many, one = saved["losses"], saved["one_rank_losses"]
    assert len(many) == len(one) == steps
    assert max(abs(a - b) / b for a, b in zip(many, one, strict=True)) <= 1e-5
    assert sum(many[-5:]) < sum(many[:5]) - steps / 20  # it learns: half a nat per byte, or a part
    for picture in ("loss.png", "plan-local.png", "plan-global.png"):
        assert (tmp_path / picture).stat().st_size > 1000


def test_a_check_that_fails_exits_with_an_error(tmp_path):
    arguments = ("--check", "--check-tolerance", "-1", "--steps", "2", "--seq-len", "256")
    output = launch(tmp_path, *arguments, ranks=2, fails=True)
    assert "check FAILED: 2 steps" in output


def test_plain_python_trains_in_bf16(tmp_path):
    arguments = ("--dtype", "bf16", "--steps", "30", "--seq-len", "256", "--lr", "0.01")
    output = launch(tmp_path, *arguments)
    assert "tokens/s" in output and "on plans" in output
    speed = result(tmp_path)["speed"]
    assert speed["tokens_per_second"] > 0 and 0 < speed["planning_share"] < 1
    assert speed["peak_gpu_bytes"] is None
    losses = result(tmp_path)["losses"]
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # log(256): a uniform guess
    assert sum(losses[-5:]) < sum(losses[:5]) - 2.5


# Runs on the ranks of the pool


FSDP = ("--fsdp", "--checkpoint-activations")


def texts() -> list[bytes]:
    return [Path(module.__file__).read_bytes() for module in (dataclasses, json, subprocess)]


def trained(group: dist.ProcessGroup, documents: list[bytes], out: Path, *arguments: str) -> Any:
    """The steps and the weights' digest of a run whose ranks, all of `group`, share sequences."""
    config = train_script.parse_config([*TINY, "--seq-len", "300", "--out", str(out), *arguments])
    cpu = torch.device("cpu")
    ranks = ranks_script.Ranks(everyone=group, cp=group, dp_rank=0, dp_size=1, device=cpu)
    source = PackedDocuments(documents, seq_len=config.seq_len, seed=config.seed)
    run = train_script.train(config.on(cpu), ranks, source, title="test")
    return [asdict(step) for step in run.steps], run.weights_sha256


def trainer(pool: RankPool, out: Path) -> Callable[..., Any]:
    documents = texts()

    def train(ranks: int, *arguments: str) -> Any:
        first, *others = pool.run(trained, ranks, documents, out, *arguments)
        assert all(digest == first[1] for _, digest in others)
        return first

    return train


def assert_same_course(found: list[dict], wanted: list[dict], *, rel: float) -> None:
    assert len(found) == len(wanted)
    # AdamW forgets the scale of a gradient, so a wrong factor would not show in the losses.
    for name in ("loss", "grad_norm"):
        assert [s[name] for s in found] == pytest.approx([s[name] for s in wanted], rel=rel)


def test_runs_repeat_bit_for_bit_also_when_resumed(pool, tmp_path):
    whole, parts = (trainer(pool, tmp_path / name) for name in ("whole", "parts"))
    shared = ("--seq-len", "512", "--checkpoint-every", "4")
    steps, digest = whole(2, *shared, "--steps", "10")
    begun, _ = parts(2, *shared, "--steps", "5")
    # The fifth step is trained a second time: the newest checkpoint comes after the fourth.
    resumed, again = parts(2, *shared, "--steps", "10", "--resume")
    losses = [step["loss"] for step in steps]
    assert [step["loss"] for step in begun] == losses[:5]
    assert [step["loss"] for step in resumed] == losses and len(losses) == 10
    assert again == digest


def test_fsdp_trains_and_resumes_as_one_plain_rank_would(pool, tmp_path):
    train = trainer(pool, tmp_path)
    plain, _ = train(1, "--steps", "8")
    sharded, _ = train(2, "--steps", "8", *FSDP)
    assert_same_course(sharded, plain, rel=1e-5)

    _, digest = train(2, "--steps", "4", "--checkpoint-every", "4", *FSDP)
    for ranks, options in ((1, ()), (1, FSDP), (3, FSDP)):
        _, loaded = train(ranks, "--steps", "4", "--resume", *options)
        assert loaded == digest
        resumed, _ = train(ranks, "--steps", "8", "--resume", *options)
        assert_same_course(resumed, plain, rel=1e-5)


def test_fsdp_resumes_what_plain_ranks_wrote(pool, tmp_path):
    train = trainer(pool, tmp_path)
    plain, digest = train(2, "--steps", "4", "--checkpoint-every", "4")
    steps, loaded = train(2, "--steps", "4", "--resume", *FSDP)
    assert (steps, loaded) == (plain, digest)


def test_fsdp_trains_in_bf16(pool, tmp_path):
    train = trainer(pool, tmp_path)
    exact, _ = train(1, "--steps", "6")
    bf16 = ("--steps", "6", "--dtype", "bf16", *FSDP)
    for ranks in (1, 2):
        assert_same_course(train(ranks, *bf16)[0], exact, rel=0.05)


def dtypes_and_sizes(group: dist.ProcessGroup) -> dict[str, Any]:
    """What attention and the optimizer see of a model that FSDP shards in bf16."""
    config = train_script.parse_config([*TINY, "--dtype", "bf16", *FSDP])
    cpu = torch.device("cpu")
    ranks = ranks_script.Ranks(everyone=group, cp=group, dp_rank=0, dp_size=1, device=cpu)
    model = Transformer(config.model, config.execution)
    total = sum(parameter.numel() for parameter in model.parameters())
    ranks_script.shard_weights(model, config, ranks)
    attention, seen = rf.flex_attention, set()

    def recording(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.update(x.dtype for x in (q, k, v))
        return attention(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_script.rf, "flex_attention", recording)
        plan = rf.plan(rf.causal(), seq_len=256, group=group)
        tokens = plan.shard(torch.arange(256)[None], dim=1)
        logits = model(tokens, plan.positions, {"local": plan, "global": plan})
        logits.mean().backward()
    parameters = list(model.parameters())
    return {
        "attention": seen,
        "logits": logits.dtype,
        "weights": {parameter.dtype for parameter in parameters},
        "gradients": {parameter.grad.dtype for parameter in parameters},
        "share": sum(parameter.to_local().numel() for parameter in parameters) / total,
    }


def test_fsdp_shards_fp32_weights_and_computes_in_bf16(pool):
    for found in pool.run(dtypes_and_sizes, 4):
        assert found == {
            "attention": {torch.bfloat16},
            "logits": torch.float32,
            "weights": {torch.float32},
            "gradients": {torch.float32},
            "share": 0.25,
        }


def checked(group: dist.ProcessGroup, documents: list[bytes], out: Path) -> bool:
    """`--check` of the whole pool, two data-parallel parts."""
    dp_size, cp_size = 2, dist.get_world_size() // 2
    arguments = ["--check", "--dp", "2", "--batch-size", "2", "--steps", "4", "--seq-len", "600"]
    config = train_script.parse_config([*TINY, *arguments, "--out", str(out), *FSDP])
    mesh = init_device_mesh("cpu", (dp_size, cp_size), mesh_dim_names=("dp", "cp"))
    ranks = ranks_script.Ranks(
        everyone=group,
        cp=mesh["cp"].get_group(),
        dp_rank=mesh.get_local_rank("dp"),
        dp_size=dp_size,
        device=torch.device("cpu"),
    )
    source = PackedDocuments(documents, seq_len=config.seq_len, seed=config.seed)
    return train_script.check(config, ranks, source)


def test_fsdp_over_data_and_context_parallel_ranks_passes_the_check(pool, tmp_path):
    assert all(pool.run(checked, 8, texts(), tmp_path))
    saved = result(tmp_path)
    assert saved["config"]["fsdp"] and (saved["dp"], saved["cp"]) == (2, 4)
    assert saved["losses"] == pytest.approx(saved["one_rank_losses"], rel=1e-5)


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("precision", [(), ("--dtype", "bf16", "--check-tolerance", "0.02")])
def test_two_gpus_shard_compile_and_pass_the_check(tmp_path, precision):
    arguments = ("--check", "--steps", "20", "--seq-len", "4096", "--dim", "128")
    output = launch(tmp_path, *arguments, *precision, ranks=2, on_gpus=True)
    assert "check passed: 20 steps" in output
    saved = result(tmp_path)
    assert all(saved["config"][name] for name in ("fsdp", "compile", "checkpoint_activations"))
    assert saved["speed"]["peak_gpu_bytes"] > 0
