//! Compiles the C++ shim against libtorch and tells the linker where libtorch lies at run time, and to mark the build.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=src/torch");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let Some(libtorch) = std::env::var_os("LIBTORCH").map(PathBuf::from) else {
        println!("cargo::error=LIBTORCH is not set: run `make setup` once in this checkout (it writes .cargo/config.toml)");
        return;
    };
    let library_folder = libtorch.join("lib");
    if !is_linted() {
        compile(&libtorch.join("include"));
    }
    println!("cargo::rustc-link-lib=dylib=gomp");
    println!("cargo::rustc-link-search=native={}", library_folder.display());
    println!("cargo::rustc-env=CLOZE_LIBTORCH={}", libtorch.display());
    // By which the coordinator tells one build from another; most compilers ask for it by themselves.
    println!("cargo::rustc-link-arg=-Wl,--build-id=sha1");
    // RPATH, not RUNPATH: it also serves the libraries that libtorch_cpu itself needs.
    println!("cargo::rustc-link-arg=-Wl,--disable-new-dtags,-rpath,{}", library_folder.display());
}

/// Lints read no object code, and the shim takes a minute to compile.
fn is_linted() -> bool {
    std::env::var_os("RUSTC_WORKSPACE_WRAPPER").is_some_and(|wrapper| wrapper.to_string_lossy().contains("clippy-driver"))
}

fn compile(include: &Path) {
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .opt_level(3)
        .flag("-fopenmp")
        // ATen's headers use these words in ways that newer compilers warn about; our own files are compiled with every warning on.
        .flag("-isystem")
        .flag(include.display().to_string())
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").display().to_string())
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .warnings(true)
        .extra_warnings(false)
        .files(["src/torch/shim.cpp", "src/torch/attention.cpp", "src/torch/kernels.cpp"])
        .compile("cloze_shim");
}
