"""Hydra groups. `rltk.compose` reads them; `python -m rltk.train --help` lists them."""
