"""The family of errors."""

import pickle

from densenet_dist import errors

CODES = {
    "TrainingError": 1,
    "ConfigError": 2,
    "EnvironmentProblem": 3,
    "DataError": 4,
    "StorageError": 5,
    "CheckpointError": 6,
}


def test_each_kind_has_its_exit_code_and_travels_between_processes():
    for name, code in CODES.items():
        error = getattr(errors, name)("what\n  how to mend it")
        assert isinstance(error, errors.DenseNetDistError)
        assert error.exit_code == code
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), "what\n  how to mend it")
