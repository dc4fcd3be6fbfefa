"""One worker: it joins the run, executes its stage, and leaves."""
