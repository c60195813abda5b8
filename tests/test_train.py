"""scripts/train.py: packing, the model's rotary embeddings, and whole runs on several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="scripts/train.py draws its losses")
pytest.importorskip("tqdm", reason="scripts/train.py shows its progress")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import train as train_script  # noqa: E402
from data import IGNORE_LABEL, PackedDocuments, standard_library_documents  # noqa: E402
from model import ModelConfig, rotary_angles, rotate  # noqa: E402

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
    import dataclasses

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


def test_resume_refuses_other_settings_and_missing_checkpoints(tmp_path):
    config = train_script.parse_config(["--out", str(tmp_path)])
    nothing: Any = None  # refused before the model is touched
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        train_script.load_checkpoint(config, nothing, nothing)

    folder = tmp_path / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (folder / "losses.json").write_text(json.dumps({"config": vars(config)}))
    with pytest.raises(ValueError, match=r"lr=0\.5, but .* was trained with lr=0\.003"):
        train_script.load_checkpoint(replace(config, lr=0.5), nothing, nothing)


def test_check_judges_every_step():
    one = [4.0, 3.0, 2.0]
    assert train_script.report_check(one, [4.0, 3.00002, 2.0], tolerance=1e-5)
    assert not train_script.report_check(one, [4.0, 3.00004, 2.0], tolerance=1e-5)


# Whole runs


def launch(out: Path, *arguments: str, ranks: int | None = None, fails: bool = False) -> str:
    """Run scripts/train.py on `ranks` processes, or without a launcher; what it printed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks else ()), str(SCRIPTS / "train.py")]
    command += [*TINY, "--out", str(out), *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
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
    ("ranks", "arguments"),
    [
        pytest.param(2, ("--seq-len", "1100"), id="cp2-padded"),
        pytest.param(4, ("--seq-len", "1024"), id="cp4"),
        pytest.param(4, ("--seq-len", "600", "--dp", "2", "--batch-size", "4"), id="dp2xcp2"),
    ],
)
def test_fifty_steps_have_the_losses_of_one_process(tmp_path, ranks, arguments):
    output = launch(tmp_path, "--check", "--steps", "50", *arguments, ranks=ranks)
    assert "check passed: 50 steps" in output
    saved = result(tmp_path)
    assert (saved["dp"], saved["cp"]) == ((2, 2) if "--dp" in arguments else (1, ranks))
    many, one = saved["losses"], saved["one_rank_losses"]
    assert len(many) == len(one) == 50
    assert max(abs(a - b) / b for a, b in zip(many, one, strict=True)) <= 1e-5
    assert sum(many[-5:]) < sum(many[:5]) - 2.5  # it learns: half a nat per byte at least
    for picture in ("loss.png", "plan-local.png", "plan-global.png"):
        assert (tmp_path / picture).stat().st_size > 1000


def test_a_check_that_fails_exits_with_an_error(tmp_path):
    arguments = ("--check", "--check-tolerance", "-1", "--steps", "2", "--seq-len", "256")
    output = launch(tmp_path, *arguments, ranks=2, fails=True)
    assert "check FAILED: 2 steps" in output


def test_plain_python_trains_in_bf16(tmp_path):
    launch(tmp_path, "--dtype", "bf16", "--steps", "30", "--seq-len", "256", "--lr", "0.01")
    losses = result(tmp_path)["losses"]
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # log(256): a uniform guess
    assert sum(losses[-5:]) < sum(losses[:5]) - 2.5


def test_runs_repeat_bit_for_bit_also_when_resumed(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    shared = ("--seq-len", "512", "--checkpoint-every", "4")
    launch(whole, *shared, "--steps", "10", ranks=2)
    launch(parts, *shared, "--steps", "5", ranks=2)
    assert result(parts)["losses"] == result(whole)["losses"][:5]
    # The fifth step is trained a second time: the newest checkpoint comes after the fourth.
    launch(parts, *shared, "--steps", "10", "--resume", ranks=2)
    for name in ("losses", "weights_sha256"):
        assert result(parts)[name] == result(whole)[name]
    assert len(result(whole)["losses"]) == 10
