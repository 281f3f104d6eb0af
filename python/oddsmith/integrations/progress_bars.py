"""Hides the progress bars of datasets and transformers."""

from __future__ import annotations

from .patch import Patch

__all__ = ["NoProgressBars"]


class NoProgressBars(Patch):
    """Hides the progress bars of datasets and transformers; bars that were hidden before stay
    hidden.
    """

    target = "progress bars of datasets and transformers"
    purpose = "Each takes less than a second in `oddsmith demo`, which shows another bar."
    tested = "datasets 4.0 and 5.2, transformers 5.17 and 5.24"
    fallback = "their progress bars are shown"
    needs = (
        "datasets:are_progress_bars_disabled",
        "datasets:disable_progress_bars",
        "datasets:enable_progress_bars",
        "transformers.utils.logging:is_progress_bar_enabled",
        "transformers.utils.logging:disable_progress_bar",
        "transformers.utils.logging:enable_progress_bar",
    )

    def _change(self) -> None:
        import datasets
        from transformers.utils import logging

        self._shown = not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        logging.disable_progress_bar()

    def _restore(self) -> None:
        import datasets
        from transformers.utils import logging

        datasets_shown, transformers_shown = self._shown
        if datasets_shown:
            datasets.enable_progress_bars()
        if transformers_shown:
            logging.enable_progress_bar()
