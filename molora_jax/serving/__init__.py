"""Runs behind the OpenAI API: `python -m launch.serve --workdir=DIR`; see docs/serving.md."""
