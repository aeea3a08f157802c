"""Labelled data from wherever the user keeps it, checked and in memory: `load` and `LabelledData`."""

from steadynorm.experiment.data.labelled import LabelledData
from steadynorm.experiment.data.sources import Source, load

__all__ = ["LabelledData", "Source", "load"]
