"""The report's page: sections, plots, templates."""
