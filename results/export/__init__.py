"""The leaderboard as Markdown, CSV, LaTeX, JSON and Parquet."""
