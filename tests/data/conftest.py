"""What is logged, for the tests of the data."""

import logging

import pytest
from mmengine.logging import MMLogger


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def told(self, word: str) -> list[logging.LogRecord]:
        return [record for record in self.records if word in record.getMessage()]


@pytest.fixture
def log():
    handler, logger = Log(), MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
