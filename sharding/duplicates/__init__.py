"""The parts of `dedupe`: finding pairs, deciding who stays, telling why."""
