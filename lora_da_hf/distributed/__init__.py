"""The processes of a run, behind one interface of which a single process is the simplest case."""
