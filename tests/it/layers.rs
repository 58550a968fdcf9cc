//! The layers of `src/`: which module may import which, read from the paths in the source.
//!
//! A path counts if it starts with `crate::`, `super::`, or the name of a module that the
//! file imports or declares. Test modules may import anything.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Modules that every other may import. They import only one another.
const LEAVES: [&str; 5] = ["config", "error", "limits", "pb", "telemetry"];

/// What each layer may import in addition to itself and the leaves.
const LAYERS: [(&str, &[&str]); 8] = [
    ("app", &["api", "cli", "feed", "health", "model", "server", "store"]),
    ("api", &["feed", "model", "store"]),
    ("feed", &["model", "store"]),
    ("store", &["model"]),
    ("cli", &["model"]),
    ("health", &["store"]),
    ("server", &[]),
    ("model", &[]),
];

/// The roots of the library and of the binary may import everything.
const ROOTS: [&str; 2] = ["src/lib.rs", "src/main.rs"];

/// A path in a file that names something in another module.
struct Import {
    /// Such as `src/store/users.rs`.
    file: String,
    line: usize,
    /// The module of that file, such as `store::users`.
    from: String,
    /// The imported path, such as `store::pool::Db`.
    path: String,
}

#[test]
fn every_module_imports_only_the_layers_below_it() {
    let (files, imports) = read_sources();
    let mut violations: Vec<String> = files
        .iter()
        .filter(|(module, _)| allowed(layer(module)).is_none())
        .map(|(_, file)| format!("{file}:1: this module belongs to no layer: add it to {}", file!()))
        .collect();
    for Import { file, line, from, path } in &imports {
        let (layer, target) = (layer(from), layer(path));
        let Some(allowed) = allowed(layer) else { continue };
        if target != layer && !LEAVES.contains(&target) && !allowed.contains(&target) {
            let list = [allowed, &LEAVES].concat().join(", ");
            violations.push(format!("{file}:{line}: {layer} imports crate::{path}; it may import {list}"));
        }
    }
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
}

#[test]
fn imports_of_files_form_no_cycle() {
    let (files, imports) = read_sources();
    let mut graph: BTreeMap<&str, Vec<(&str, &Import)>> = BTreeMap::new();
    for import in &imports {
        let Some(target) = module_of(&import.path, &files) else { continue };
        if target != import.from {
            graph.entry(&import.from).or_default().push((target, import));
        }
    }
    // A reader that sees no paths would find no cycle either.
    assert!(graph["app"].iter().any(|(target, _)| *target == "server::listener"), "app imports no listener");

    // A module without imports is in no cycle, and neither is one that imports only such
    // modules. What remains imports a cycle or is part of one.
    loop {
        let modules: Vec<&str> = graph.keys().copied().collect();
        for edges in graph.values_mut() {
            edges.retain(|(target, _)| modules.contains(target));
        }
        graph.retain(|_, edges| !edges.is_empty());
        if graph.len() == modules.len() {
            break;
        }
    }
    let Some(mut module) = graph.keys().next().copied() else { return };
    let mut cycle: Vec<(&str, &Import)> = Vec::new();
    while !cycle.iter().any(|(from, _)| *from == module) {
        let (target, import) = graph[module][0];
        cycle.push((module, import));
        module = target;
    }
    let lines = cycle.iter().skip_while(|(from, _)| *from != module).map(|(from, import)| {
        format!("{}:{}: {from} imports crate::{}", import.file, import.line, import.path)
    });
    panic!("\nfiles must not import one another in a cycle:\n{}\n", lines.collect::<Vec<_>>().join("\n"));
}

#[test]
fn imports_are_read_from_every_form_of_path() {
    let source = "\
use crate::store::{
    self, list,
    pool::{self, Db as Database},
};
// use crate::comment;
pub(crate) use $crate::macros::column;
fn f() -> crate::error::Error {
    super::export::run::<u8>(crate::cli::ADDR, list::page(), child::f(), other::list::g());
}
mod child;
#[cfg(test)]
use crate::single;
#[cfg(test)]
#[expect(reason)]
mod tests {
    use crate::tested;
}
use crate::last::*;
";
    let found = paths(source, "cli::import");
    let expected = [
        (1, "store"),
        (1, "store::list"),
        (1, "store::pool"),
        (1, "store::pool::Db"),
        (3, "store::pool"),
        (3, "store::pool::Db"),
        (6, "macros::column"),
        (7, "error::Error"),
        (8, "cli::ADDR"),
        (8, "cli::export::run"),
        (8, "cli::import::child::f"),
        (8, "store::list::page"),
        (18, "last"),
    ];
    assert_eq!(found, expected.map(|(line, path)| (line, path.to_owned())));
}

/// The layer of a module or path: its first segment.
fn layer(path: &str) -> &str {
    path.split("::").next().unwrap()
}

/// What a layer may import in addition to itself and the leaves. `None` if there is no
/// such layer.
fn allowed(layer: &str) -> Option<&'static [&'static str]> {
    let found = LAYERS.iter().find(|(name, _)| *name == layer).map(|(_, allowed)| *allowed);
    found.or_else(|| LEAVES.contains(&layer).then_some(&[]))
}

/// The longest prefix of a path that is the module of a file.
fn module_of<'a>(path: &'a str, files: &BTreeMap<String, String>) -> Option<&'a str> {
    let mut prefix = path;
    while !files.contains_key(prefix) {
        prefix = prefix.rsplit_once("::")?.0;
    }
    Some(prefix)
}

/// All modules with their files, and all imports, except those of the roots.
fn read_sources() -> (BTreeMap<String, String>, Vec<Import>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut files, mut imports) = (BTreeMap::new(), Vec::new());
    let mut pending = vec![root.join("src")];
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            pending.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let file = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        if !file.ends_with(".rs") || ROOTS.contains(&file.as_str()) {
            continue;
        }
        let from = module_name(&file);
        for (line, path) in paths(&fs::read_to_string(path).unwrap(), &from) {
            imports.push(Import { file: file.clone(), line, from: from.clone(), path });
        }
        files.insert(from, file);
    }
    imports.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
    (files, imports)
}

/// `src/store/users.rs` is `store::users`, and `src/store/mod.rs` is `store`.
fn module_name(file: &str) -> String {
    let path = PathBuf::from(file).with_extension("");
    let path = if path.ends_with("mod") { path.parent().unwrap() } else { &path };
    path.strip_prefix("src").unwrap().to_str().unwrap().replace('/', "::")
}

/// The paths in a source file that name something in this crate, as paths from its root,
/// each with its line.
fn paths(source: &str, module: &str) -> Vec<(usize, String)> {
    let source = without_comments_and_tests(source);
    let mut found = paths_after(&source, "crate", "");
    found.extend(paths_after(&source, "super", parent(module)));
    let declared = source.lines().filter_map(|line| line.split_once("mod ")?.1.strip_suffix(';'));
    let mut modules: Vec<_> = declared.map(|name| format!("{module}::{name}")).collect();
    modules.extend(found.iter().map(|(_, path)| path.clone()));
    modules.sort();
    modules.dedup();
    for path in modules {
        let name = path.rsplit("::").next().unwrap();
        // A type or a constant starts with a capital letter.
        if name.starts_with(char::is_lowercase) {
            found.extend(paths_after(&source, name, &path));
        }
    }
    found.sort();
    found.dedup();
    found
}

/// The paths that start with `name::`, which stands for the path `base`.
fn paths_after(source: &str, name: &str, base: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let is_part_of_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    for (start, matched) in source.match_indices(&format!("{name}::")) {
        let (before, after) = (&source[..start], &source[start + matched.len()..]);
        if !before.ends_with(is_part_of_path) {
            let mut paths = Vec::new();
            expand(after, base, &mut paths);
            let line = before.matches('\n').count() + 1;
            found.extend(paths.into_iter().map(|path| (line, path)));
        }
    }
    found
}

fn parent(path: &str) -> &str {
    path.rsplit_once("::").map_or("", |(parent, _)| parent)
}

/// Reads a path or a tree of paths at the start of `text`, and returns the rest.
fn expand<'a>(text: &'a str, base: &str, paths: &mut Vec<String>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        while !rest.is_empty() {
            rest = rest.trim_start().trim_start_matches(',').trim_start();
            match rest.strip_prefix('}') {
                Some(rest) => return rest,
                None => rest = expand(rest, base, paths),
            }
        }
        return rest;
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let path = match name {
        "" | "self" => base.to_owned(),
        "super" => parent(base).to_owned(),
        _ if base.is_empty() => name.to_owned(),
        _ => format!("{base}::{name}"),
    };
    if let Some(rest) = rest.strip_prefix("::") {
        return expand(rest, &path, paths);
    }
    paths.push(path);
    // Skips `*`, `as other` and the like.
    &rest[rest.find([',', '}']).unwrap_or(rest.len())..]
}

/// Blanks the lines of comments and of items under `#[cfg(test)]`. Line numbers stay.
fn without_comments_and_tests(source: &str) -> String {
    let mut is_test = false;
    let mut out = String::new();
    for line in source.lines() {
        is_test |= line == "#[cfg(test)]";
        if !is_test && !line.trim_start().starts_with("//") {
            out.push_str(line);
        }
        out.push('\n');
        // An item ends with an unindented brace or semicolon.
        is_test &= !(line.starts_with('}') || line.ends_with(';') && !line.starts_with(char::is_whitespace));
    }
    out
}
