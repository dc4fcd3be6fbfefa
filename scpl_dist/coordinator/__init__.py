"""Schedules the items of a run and watches its workers. No torch."""
