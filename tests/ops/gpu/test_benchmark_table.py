"""The verdicts and the table of the GPU's benchmark, on made-up figures."""

from gpu_table import summary, verdicts


def content_of(found, step=None):
    return {"machine": {"device": "a stand-in", "capability": "9.0"}, "step": step, "rows": found}


def made_up(ours, eager, compiled, x_bytes, tuned=1000.0):
    times = {"ours": [0, ours, 0], "eager": [0, eager, 0], "compiled": [0, compiled, 0], "tuned": [0, tuned, 0]}
    halves = {"forward": times, "backward": times}
    return {
        "name": "x", "variant": "relu", "dtype": "float32", "layout": "contiguous", "x_bytes": x_bytes,
        "bytes_moved": {"forward": 3 * x_bytes, "backward": 5 * x_bytes}, "copy_bytes": 2 * x_bytes,
        "copy_us": [0, 100.0, 0], "times_us": {**halves, "both": times}, "host_us": {"ours": [0, 9.0, 0]},
        "graph_us": {}, "skipped": {}, "late": 0,
    }  # fmt: skip


def test_verdicts_by_hand():
    """Eight times x in 400 us, where a copy takes 100 us for two: 100 %; in 500 us 80 %, in 600 us 67 %."""
    found = [made_up(400.0, 800.0, 360.0, 100e6), made_up(500.0, 500.0, 500.0, 1e6)]
    eager, compiled, bandwidth, step = verdicts(content_of(found, {"faster": 0.05}))
    assert (eager.figure, eager.word) == ("1.41, of 2 rows", "MISSED")  # the root of 2 x 1
    assert (compiled.figure, compiled.word) == ("0.95, of 2 rows", "MISSED")  # the root of 0.9 x 1
    assert (bandwidth.figure, bandwidth.word) == ("100 %, least 100 %, 1 of 1", "met")
    assert (step.figure, step.word) == ("5.0 %", "MISSED")
    found = [made_up(500.0, 750.0, 700.0, 100e6, 600.0), made_up(600.0, 900.0, 700.0, 65e6)]
    eager, compiled, bandwidth, step = verdicts(content_of(found, {"faster": 0.081}))
    assert (eager.figure, eager.word) == ("1.50, of 2 rows", "met")
    assert (compiled.figure, compiled.word) == ("1.18, of 2 rows", "met")  # the root of 6/5 x 7/6: the faster counts
    assert (bandwidth.figure, bandwidth.word) == ("73 %, least 67 %, 1 of 2", "MISSED")  # the root of 0.8 x 0.667
    assert (step.figure, step.word) == ("8.1 %", "met")
    nothing = verdicts(content_of([]))
    assert [(verdict.figure, verdict.word) for verdict in nothing] == [("not measured", "")] * 4
    assert verdicts(content_of([], {"wrong": "it is"}))[3].word == "MISSED"


def test_what_went_wrong_is_in_the_table():
    strange = {**made_up(4.0, 4.0, 4.0, 1e6), "skipped": {"tuned": "no compiler"}, "late": 3}
    content = {**content_of([strange, {"name": "y", "wrong": "far off"}], {"wrong": "another loss"}), "failed": "gone"}
    content["machine"]["capability"] = "8.0"
    shown = summary(content)
    for part in ("without tuned: x: no compiler", "y: far off", "another loss", "ENDED EARLY: gone", "late", "has 8.0"):
        assert part in shown
