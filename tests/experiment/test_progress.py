from steadynorm.experiment.progress import Progress


def test_estimates_give_way_to_what_a_stage_asks_for():
    bar = Progress(False)
    bar.foresee({"first": 4, "second": 10})
    assert bar.counts == (0, 14)
    bar.stage("first")
    bar.expect(6)
    bar.done()
    assert bar.counts == (1, 16)
    bar.stage("second")
    assert bar.counts == (1, 6)


def test_the_bar_goes_to_stderr_with_the_stage_and_the_counts(capsys):
    with Progress(True) as bar:
        bar.foresee({"tuning": 2})
        bar.stage("tuning")
        bar.expect(3)
        for _ in range(3):
            bar.done()
    out, err = capsys.readouterr()
    assert out == ""
    assert "tuning" in err
    assert "3/3" in err
