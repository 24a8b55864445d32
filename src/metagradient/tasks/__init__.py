"""Applications: one file each, on top of the descent.

How a task plugs in. It is a module with

    a configuration     a frozen dataclass of plain settings, with `out: Path | None` and `seed: int` among them
    run(config, *, resume=False) -> dict
                        once its input has been checked, opens
                        `RunDirectory.begin(config.out or free_directory(NAME), config, NAME, resume=resume)`; hands
                        `out=directory.path` to `descend`, which then goes on by itself where a killed run stopped;
                        leaves what its page shows in files of the directory; calls `directory.result(figures)`, which
                        says that the run is finished; and writes `page(directory)` to `report.html`
    page(directory) -> Page
                        the report, of the files alone: `metagradient report` makes it again at any time

and a line in `metagradient.tasks.registry`. `--out`, `--resume`, `--config`, `--preset`, `report` and comparisons then
work for it. What a run does after its descent is done anew on a resume: it must be a function of configuration and
descent.
"""
