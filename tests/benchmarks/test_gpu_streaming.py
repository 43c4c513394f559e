"""The GPU benchmark: what of it a machine without one can run."""

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch):
    import gpu_streaming

    monkeypatch.setattr(gpu_streaming, "BATCH", 4)
    return gpu_streaming


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(script, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu_streaming.py", "--out", str(tmp_path)])
    script.main()
    assert capsys.readouterr().out == "gpu_streaming: no CUDA device, nothing was checked or measured\n"
    assert list(tmp_path.iterdir()) == []


def test_its_comparison_of_encodings_passes_where_both_sides_are_the_cpu(script, tmp_path):
    found = script.check_encodings(tmp_path, CPU)
    assert found["int8"] == "bit for bit, streamed and resident"


def test_it_counts_batches_that_are_not_what_they_should_be(script, tmp_path):
    script.make_cache(tmp_path / "c", script.SMALL, "fp16", 12)
    expected = script.expected_batches(tmp_path / "c", 2)
    assert len(expected) == 6

    def found():
        source = script.open_train(tmp_path / "c", CPU)
        return script.kept(lambda epoch: script.delayed(source, 9, CPU, epoch), script.device_batches, 2, CPU)

    assert script.wrong_batches(found(), expected) == 0
    expected[4]["pooled"].view(torch.int32)[2, 7] ^= 1
    assert script.wrong_batches(found(), expected) == 1
