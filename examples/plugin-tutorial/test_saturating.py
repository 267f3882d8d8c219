import posenc.testing
from saturating import Saturating


class TestSaturating(posenc.testing.StrategyContract):
    strategy = Saturating
    params = ({}, {"near": 5})
