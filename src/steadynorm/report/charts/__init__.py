"""The charts as plain Plotly figures: dictionaries of traces and layout, one file per question that they answer.

A colour is written as the name of a CSS variable, "--arm-0" or "--arm-0@0.15" with an opacity; the page's script puts
in the value that it has in the light or the dark theme. So the colours live in the style sheet alone.
"""

from steadynorm.report.charts.base import Chart, Switch
from steadynorm.report.charts.inside import drift_charts, gradient_charts
from steadynorm.report.charts.remedies import regularization_chart, standardization_chart, timing_chart
from steadynorm.report.charts.settings import batch_size_chart, sensitivity_chart
from steadynorm.report.charts.speed import accuracy_chart, ratio_chart, ratio_curve_chart

__all__ = [
    "Chart",
    "Switch",
    "accuracy_chart",
    "batch_size_chart",
    "drift_charts",
    "gradient_charts",
    "ratio_chart",
    "ratio_curve_chart",
    "regularization_chart",
    "sensitivity_chart",
    "standardization_chart",
    "timing_chart",
]
