//! Tests of the built programs from outside, one binary for all: what is promised of a whole run, of every way in which it can go
//! wrong, and of the documents.
//!
//! `sandbox` makes small worlds in temporary folders and watches processes; each file of `suite` covers one promise; `chaos` lets faults of
//! every kind happen to one run. A test that needs something this machine does not have writes SKIPPED and the reason to stderr, also
//! where the output of tests is captured.

mod chaos;
mod sandbox;
mod suite;
