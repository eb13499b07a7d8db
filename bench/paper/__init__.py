"""The study of the SAM paper (Foret et al., ICLR 2021), one module per experiment: python -m bench.paper.NAME --help"""
