"""The guide's tables say what the file of measurements does."""

import recalibrate


def test_the_page_is_as_it_was_measured():
    page = recalibrate.GUIDE.read_text(encoding="utf-8")
    assert recalibrate.written(page) == page
    assert page.count("| averaged weights") == 1
