"""List the experiments: python -m bench.paper"""

from bench.paper import runner

if __name__ == "__main__":
    for experiment in runner.experiments():
        print(f"python -m bench.paper.{experiment.name:<16}{experiment.description.splitlines()[0]}")
