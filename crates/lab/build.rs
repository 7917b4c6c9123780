//! Lists the scenario files, for a program that runs far from its source.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let directory = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../scenarios");
    println!("cargo::rerun-if-changed={}", directory.display());
    let mut files: Vec<PathBuf> = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    files.sort();
    let list: String = files
        .iter()
        .map(|path| format!("({:?}, include_str!({path:?})),", path.file_stem().unwrap().to_str().unwrap()))
        .collect();
    let output = Path::new(&env::var("OUT_DIR").unwrap()).join("built_in.rs");
    fs::write(output, format!("const BUILT_IN: &[(&str, &str)] = &[{list}];")).unwrap();
}
