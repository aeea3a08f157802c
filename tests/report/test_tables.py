from steadynorm.report import tables
from steadynorm.report.schema import Results
from steadynorm.report.tables import Table


def row(table: Table, *start: str) -> dict[str, str]:
    """The first row that starts so, by the names of its columns (the last of two columns with one name)."""
    found = next(r for r in table.rows if r[: len(start)] == start)
    return dict(zip(table.columns, found, strict=True))


def test_every_table_has_as_many_cells_as_columns(results: Results) -> None:
    makers = ("summaries", "claims", "curves", "ratios", "tuning", "gradients", "drift", "batch_sizes",
              "regularization", "standardization", "timing")  # fmt: skip
    for name in makers:
        table = getattr(tables, name)(results)
        assert table.rows, name
        assert {len(r) for r in table.rows} == {len(table.columns)}, name
        assert not any(column.startswith(">") for column in table.columns)
        assert 0 not in table.numeric, name


def test_an_arm_in_one_row(results: Results) -> None:
    plain = row(tables.summaries(results), "Plain")
    assert plain["Steps to target"] == "350"
    assert plain["Reached"] == "9/10"
    assert plain["Test accuracy"] == "96.0 %"
    assert plain["Time per step"] == "410 µs"
    results["summaries"][0]["steps_to_target"] = None
    assert row(tables.summaries(results), "Plain")["Steps to target"] == "not reached"


def test_curves_are_thinned_but_keep_their_ends(results: Results) -> None:
    table = tables.curves(results, points=5)
    steps = [r[3] for r in table.rows if r[:2] == ("Plain", "speed")]
    assert len(steps) == 5
    assert (steps[0], steps[-1]) == ("5", "4,000")
    short = results["curves"][0]
    for name in ("steps", "p10", "p50", "p90"):
        short[name] = short[name][:3]
    assert len([r for r in tables.curves(results, points=5).rows if r[:2] == ("Plain", "speed")]) == 3


def test_tuning_is_sorted_by_arm_initialisation_and_rate(results: Results) -> None:
    results["tuning"].reverse()
    rows = tables.tuning(results).rows
    assert rows[0][:3] == ("Plain", "corrected", "0.00032")
    assert rows[-1][:3] == ("Batch norm after the nonlinearity", "default", "32")
    diverged = row(tables.tuning(results), "Plain", "corrected", "3.2")
    assert (diverged["Diverged"], diverged["Trains"]) == ("3/3", "no")


def test_gradients_name_first_middle_and_last(results: Results) -> None:
    results["gradients"][0]["norms"] = [1e-6, 2e-6, 3e-6, 4e-6, 5.0]
    plain = row(tables.gradients(results), "Plain", "start")
    assert (plain["First layer"], plain["Middle layer"], plain["Last layer"]) == ("1e-6", "3e-6", "5")


def test_ratios_say_how_they_were_found(results: Results) -> None:
    last = tables.ratios(results, curve=True).rows[-1]
    assert last[3] == "at least 4.1× (4.1 or more)"
    assert last[-1] == "at least"
