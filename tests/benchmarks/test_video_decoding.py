"""The benchmark of decoding runs, and counts wrong frames where there are some."""


def test_our_reader_gives_no_wrong_frame_where_seeking_does(tmp_path, monkeypatch):
    import video_decoding as module

    monkeypatch.setattr(module, "SIZE", (64, 96))
    rows = module.measure(tmp_path, frames=90, rounds=2)["rows"]
    assert len(rows) == 9
    assert all(row["rate"] > 0 and row["frames"] == 32 for row in rows.values())
    wrong = {name: row["wrong"] for name, row in rows.items()}
    assert {name: n for name, n in wrong.items() if "decord" not in name and n} == {}
    assert wrong["edit list: decord get_batch"] > 0
