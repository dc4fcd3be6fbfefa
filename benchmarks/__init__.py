"""Speed is measured here and nowhere asserted; run on an idle machine."""
