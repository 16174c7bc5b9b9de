"""Prompt sets that are made: compositions for GenEval, lettering for OCR."""
