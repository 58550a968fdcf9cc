//! The command line: the commands, and the parsing of their flags and variables.
//!
//! The settings of the server belong to `serve`, to `migrate` and to the bare `user-service`,
//! which is `serve`. The other commands do not read them, so an invalid setting of a server
//! does not stop a client on the same machine.

use std::{env, ffi::OsString};

use clap::{
    ArgMatches, Args, CommandFactory, FromArgMatches, Id, Parser, Subcommand,
    builder::{Resettable, ValueParser},
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};

use super::{check::Check, export::Export, import::Import, watch::Watch};
use crate::config::Config;

/// The settings that `migrate` uses.
const MIGRATE_SETTINGS: &[&str] = &["database_url", "data_dir", "rust_log", "log_format"];
/// The settings that `watch` uses.
const WATCH_SETTINGS: &[&str] = &["rust_log", "log_format"];

/// Without a command: the settings of `serve`.
#[derive(Debug, Parser)]
#[command(version, about, disable_help_subcommand = true, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: Box<Config>,
}

/// A command with its arguments.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the service (the default).
    Serve(Box<Config>),
    /// Update the schema of the database, then exit.
    Migrate(Box<Config>),
    /// Ask a running service for its health; exit with 0 if it is SERVING, else with 1.
    Check(Check),
    /// Import users from a file into a running service; exit with 1 if a line was rejected.
    Import(Import),
    /// Export the users of a running service to a file.
    Export(Export),
    /// Print every change of a user as a line of JSON, until interrupted.
    Watch(Watch),
}

impl Command {
    /// Parses the command line and the environment of this process. If that fails, prints
    /// every invalid setting, not only the first, and exits.
    pub fn from_process() -> Self {
        match Self::parse(&env::args_os().collect::<Vec<_>>()) {
            Ok(command) => command,
            Err(error) => error.exit(),
        }
    }

    /// clap stops at the first invalid value. To find all, the parser of that setting is
    /// replaced by one that accepts everything, and the command line is parsed again.
    fn parse(args: &[OsString]) -> Result<Self, clap::Error> {
        let mut parser = parser();
        let name = args.get(1).and_then(|arg| arg.to_str());
        let name = name.filter(|name| parser.find_subcommand(name).is_some()).map(str::to_owned);
        if name.is_some() {
            // The settings of the bare command do not apply.
            parser = parser.mut_args(|arg| arg.env(Resettable::Reset));
        }
        let mut problems = Vec::new();
        loop {
            let error = match parser.clone().try_get_matches_from(args) {
                Ok(matches) if problems.is_empty() => return from_matches(&parser, &matches),
                Ok(_) => return Err(parser.error(ErrorKind::ValueValidation, problems.join("\n       "))),
                Err(error) => error,
            };
            let command = match &name {
                Some(name) => parser.find_subcommand(name),
                None => Some(&parser),
            };
            let Some(id) = command.and_then(|command| setting_of(&error, command)) else { return Err(error) };
            problems.push(problem(&id.to_string().to_uppercase(), &error));
            let accept = |command: clap::Command| {
                command.mut_arg(id, |arg| arg.value_parser(ValueParser::os_string()))
            };
            parser = match &name {
                Some(name) => parser.mut_subcommand(name, accept),
                None => accept(parser),
            };
        }
    }
}

/// The parser of the command line.
fn parser() -> clap::Command {
    Cli::command()
        .mut_subcommand("migrate", |command| keep_settings(command, MIGRATE_SETTINGS))
        .mut_subcommand("watch", |command| keep_settings(command, WATCH_SETTINGS))
}

/// Hides the settings that a command does not use. Their variables are not read, and
/// `from_matches` rejects their flags.
fn keep_settings(command: clap::Command, used: &[&str]) -> clap::Command {
    let settings = Config::augment_args(clap::Command::new(""));
    let settings = settings.get_arguments().map(|arg| arg.get_id().clone());
    settings
        .filter(|id| !used.contains(&id.as_str()))
        .fold(command, |command, id| command.mut_arg(id, |arg| arg.hide(true).env(Resettable::Reset)))
}

fn from_matches(parser: &clap::Command, matches: &ArgMatches) -> Result<Command, clap::Error> {
    if let Some((name, matches)) = matches.subcommand() {
        let command = parser.find_subcommand(name);
        let mut hidden =
            command.iter().flat_map(|command| command.get_arguments()).filter(|arg| arg.is_hide_set());
        let is_given =
            |arg: &&clap::Arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
        if let Some(arg) = hidden.find(is_given) {
            let flag = arg.get_long().unwrap_or_default();
            let message = format!("unexpected argument '--{flag}': {name} does not use it");
            return Err(parser.clone().error(ErrorKind::UnknownArgument, message));
        }
    }
    let Cli { command, config } = Cli::from_arg_matches(matches)?;
    Ok(command.unwrap_or(Command::Serve(config)))
}

/// The setting whose value clap has rejected.
fn setting_of(error: &clap::Error, command: &clap::Command) -> Option<Id> {
    let Some(ContextValue::String(text)) = error.get(ContextKind::InvalidArg) else { return None };
    let settings = Config::augment_args(clap::Command::new(""));
    // An argument has a name to compare only after its command is built.
    let mut command = command.clone();
    command.build();
    let mut arguments = command.get_arguments();
    let id = arguments.find(|arg| arg.to_string() == *text).map(|arg| arg.get_id().clone())?;
    settings.get_arguments().any(|arg| *arg.get_id() == id).then_some(id)
}

/// What is wrong with a setting. It does not repeat the value, which can be a secret.
fn problem(name: &str, error: &clap::Error) -> String {
    let valid = match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) => format!("must be one of {}", values.join(", ")),
        _ => std::error::Error::source(error).map_or_else(|| "is not valid".to_owned(), ToString::to_string),
    };
    format!("{name}: {valid}")
}
