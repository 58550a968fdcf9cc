//! Files of users, in JSON Lines or CSV. An exported file can be imported without a change.

use std::{
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    path::Path,
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::ValueEnum;
use csv_core::ReadRecordResult;
use serde::{Deserialize, Serialize, de::IgnoredAny};

use crate::pb;

/// A line, including its line feed, has fewer bytes than this. The limits of the fields make a
/// valid user shorter.
const LINE_MAX_BYTES: u64 = 64 * 1024;

/// Some programs write this before UTF-8 text.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The fields of a line. The service chooses the last three: an export writes them, an import
/// ignores them.
const FIELDS: [&str; 7] =
    ["id", "username", "email", "display_name", "create_time", "update_time", "revision"];

/// The format of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// One JSON object per line.
    Jsonl,
    /// RFC 4180, with a header line.
    Csv,
}

impl Format {
    /// The requested format, or else the format that the extension of the file names.
    pub fn of(path: &Path, requested: Option<Self>) -> anyhow::Result<Self> {
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        match (requested, extension.to_str()) {
            (Some(format), _) => Ok(format),
            (None, Some("jsonl" | "ndjson")) => Ok(Self::Jsonl),
            (None, Some("csv")) => Ok(Self::Csv),
            _ => bail!("the file extension names no format: use --format jsonl or --format csv"),
        }
    }
}

/// A parsed line.
pub struct Line {
    /// The number of the line; the first one is 1.
    pub number: u64,
    /// The user, or why the line is invalid.
    pub user: Result<pb::User, String>,
}

/// The parsed lines of a file, in the order of the file.
pub type Lines = Box<dyn Iterator<Item = anyhow::Result<Line>> + Send>;

/// Reads a file. A CSV record is one line, because no field of a user can contain a line
/// break. So an unclosed quote makes only its own line invalid.
pub fn read(format: Format, file: impl Read + Send + 'static) -> anyhow::Result<Lines> {
    let mut file = LineReader { file: BufReader::new(file), number: 0 };
    let mut parse: Parse = match format {
        Format::Jsonl => Box::new(parse_json),
        Format::Csv => {
            let header = file.next().context("the file is empty: a header is needed")??;
            let mut csv = Csv::new(&header.text.map_err(anyhow::Error::msg)?)?;
            Box::new(move |text| csv.parse(text))
        }
    };
    Ok(Box::new(file.map(move |line| {
        let RawLine { number, text } = line?;
        Ok(Line { number, user: text.and_then(|text| parse(&text)) })
    })))
}

/// Parses a line.
type Parse = Box<dyn FnMut(&[u8]) -> Result<pb::User, String> + Send>;

/// An unparsed line.
struct RawLine {
    number: u64,
    /// The bytes of the line, or why it is invalid.
    text: Result<Vec<u8>, String>,
}

/// Iterates over the lines of a file, without blank ones. Each ends with a line feed.
struct LineReader<R> {
    file: BufReader<R>,
    number: u64,
}

impl<R: Read> LineReader<R> {
    fn read(&mut self) -> io::Result<Option<RawLine>> {
        loop {
            let mut text = Vec::new();
            if self.file.by_ref().take(LINE_MAX_BYTES).read_until(b'\n', &mut text)? == 0 {
                return Ok(None);
            }
            self.number += 1;
            if self.number == 1 && text.starts_with(BYTE_ORDER_MARK) {
                text.drain(..BYTE_ORDER_MARK.len());
            }
            let is_whole = text.ends_with(b"\n");
            if !is_whole && text.len() as u64 == LINE_MAX_BYTES {
                self.file.skip_until(b'\n')?;
                return Ok(Some(RawLine { number: self.number, text: Err("is too long".to_owned()) }));
            }
            if !is_whole {
                text.push(b'\n');
            }
            if !text.trim_ascii().is_empty() {
                return Ok(Some(RawLine { number: self.number, text: Ok(text) }));
            }
        }
    }
}

impl<R: Read> Iterator for LineReader<R> {
    type Item = anyhow::Result<RawLine>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().context("cannot read the file").transpose()
    }
}

/// A user in JSON. Every field is optional here: the service reports missing ones.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Input {
    id: Option<String>,
    username: Option<String>,
    email: Option<String>,
    display_name: Option<String>,
    #[serde(default, rename = "create_time")]
    _create_time: IgnoredAny,
    #[serde(default, rename = "update_time")]
    _update_time: IgnoredAny,
    #[serde(default, rename = "revision")]
    _revision: IgnoredAny,
}

fn parse_json(text: &[u8]) -> Result<pb::User, String> {
    let input: Input = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    Ok(pb::User {
        id: input.id.unwrap_or_default(),
        username: input.username.unwrap_or_default(),
        email: input.email.unwrap_or_default(),
        display_name: input.display_name.unwrap_or_default(),
        ..Default::default()
    })
}

/// Parses lines of CSV.
struct Csv {
    reader: csv_core::Reader,
    header: Vec<String>,
}

impl Csv {
    fn new(text: &[u8]) -> anyhow::Result<Self> {
        let mut reader = csv_core::Reader::new();
        let header = fields(&mut reader, text).map_err(|problem| anyhow!("the header {problem}"))?;
        for (n, field) in header.iter().enumerate() {
            let is_known = FIELDS.contains(&field.as_str());
            ensure!(
                is_known,
                "the header has the unknown field {field:?}: the fields are {}",
                FIELDS.join(", ")
            );
            ensure!(!header.iter().take(n).any(|other| other == field), "the header has {field:?} twice");
        }
        Ok(Self { reader, header })
    }

    fn parse(&mut self, text: &[u8]) -> Result<pb::User, String> {
        let fields = fields(&mut self.reader, text)?;
        if fields.len() != self.header.len() {
            return Err(format!("has {} fields, but the header has {}", fields.len(), self.header.len()));
        }
        let mut user = pb::User::default();
        for (name, value) in self.header.iter().zip(fields) {
            match name.as_str() {
                "id" => user.id = value,
                "username" => user.username = value,
                "email" => user.email = value,
                "display_name" => user.display_name = value,
                _ => {}
            }
        }
        Ok(user)
    }
}

/// Splits a line of CSV into its fields.
fn fields(reader: &mut csv_core::Reader, text: &[u8]) -> Result<Vec<String>, String> {
    let mut values = vec![0; text.len()];
    let mut ends = [0; FIELDS.len() + 1];
    reader.reset();
    let (result, _, _, count) = reader.read_record(text, &mut values, &mut ends);
    match result {
        ReadRecordResult::Record => {}
        ReadRecordResult::InputEmpty => return Err("has an unclosed quote".to_owned()),
        _ => return Err(format!("has more than {} fields", FIELDS.len())),
    }
    let mut start = 0;
    let mut fields = Vec::with_capacity(count);
    for end in ends.into_iter().take(count) {
        let value = values.get(start..end).unwrap_or_default();
        fields.push(String::from_utf8(value.to_vec()).map_err(|_| "is not UTF-8")?);
        start = end;
    }
    Ok(fields)
}

/// The fields of a user that an export writes.
#[derive(Serialize)]
struct Output<'a> {
    id: &'a str,
    username: &'a str,
    email: &'a str,
    display_name: &'a str,
    create_time: String,
    update_time: String,
    revision: i64,
}

/// Writes users to a file.
pub enum Writer<W: Write> {
    /// One JSON object per line.
    Jsonl(BufWriter<W>),
    /// RFC 4180, with a header line.
    Csv(Box<csv::Writer<W>>),
}

impl<W: Write + Send + 'static> Writer<W> {
    /// Starts a file; in CSV, writes the header.
    pub fn new(format: Format, file: W) -> anyhow::Result<Self> {
        Ok(match format {
            Format::Jsonl => Self::Jsonl(BufWriter::new(file)),
            Format::Csv => {
                let mut csv = csv::WriterBuilder::new().has_headers(false).from_writer(file);
                csv.write_record(FIELDS)?;
                Self::Csv(Box::new(csv))
            }
        })
    }

    /// Writes a user.
    pub fn write(&mut self, user: &pb::User) -> anyhow::Result<()> {
        let time = |time: &Option<prost_types::Timestamp>| time.map_or_else(String::new, |t| t.to_string());
        let line = Output {
            id: &user.id,
            username: &user.username,
            email: &user.email,
            display_name: &user.display_name,
            create_time: time(&user.create_time),
            update_time: time(&user.update_time),
            revision: user.revision,
        };
        match self {
            Self::Jsonl(file) => {
                serde_json::to_writer(&mut *file, &line)?;
                file.write_all(b"\n")?;
            }
            Self::Csv(csv) => csv.serialize(line)?,
        }
        Ok(())
    }

    /// Flushes the file and returns it.
    pub fn finish(self) -> anyhow::Result<W> {
        match self {
            Self::Jsonl(file) => file.into_inner().map_err(|error| error.into_error().into()),
            Self::Csv(csv) => csv.into_inner().map_err(|error| error.into_error().into()),
        }
    }
}
