"""All trials of a plan on Ray Tune. The only place that imports Ray."""
