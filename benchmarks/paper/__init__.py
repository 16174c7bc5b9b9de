"""The paper's claims in the miniature: does distilling specialists beat joint and cascaded learning?"""
