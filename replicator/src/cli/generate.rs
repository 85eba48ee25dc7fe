//! `secondsite generate` (hidden): what packages ship besides the binary, made from the very
//! arguments that it takes. Completions for a shell, man pages into a folder.

use super::args::{Cli, GenerateArgs, Generated};
use super::failure::{Exit, Failure};
use super::output;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, roman};
use std::path::Path;

/// Exit codes, as every page lists them.
const EXIT_CODES: [(&str, &str); 9] = [
    ("0", "success"),
    ("1", "the operation failed"),
    ("64", "wrong usage"),
    ("65", "data differs, or is not what it should be"),
    ("69", "what is needed is not there"),
    ("74", "reading or writing failed"),
    ("75", "not now; the same command may succeed later"),
    ("77", "not allowed"),
    ("78", "the configuration is wrong or missing"),
];

/// Exit codes of `check`: those of Nagios.
const CHECK_CODES: [(&str, &str); 4] =
    [("0", "ok"), ("1", "warning"), ("2", "critical"), ("3", "unknown")];

/// By command: what to type, and what it does. Every one is parsed by a test.
const EXAMPLES: [(&str, &[(&str, &str)]); 21] = [
    (
        "setup",
        &[
            ("secondsite setup --store /srv/secondsite", "Make this host the second site."),
            ("secondsite setup --store /srv/secondsite --dry-run", "Only check this host."),
        ],
    ),
    ("control", &[("secondsite control", "What secondsite-control.service runs.")]),
    ("target", &[("secondsite target", "What secondsite-target.service runs.")]),
    ("replicate", &[("secondsite replicate", "What secondsite-agent.service runs.")]),
    (
        "filter",
        &[
            ("secondsite filter", "What secondsite-filter.service runs."),
            ("secondsite filter --status", "The volumes that are filtered, and how they are."),
        ],
    ),
    (
        "open",
        &[
            ("secondsite open db1", "Serve the newest exact point over NBD."),
            (
                "secondsite open db1 --at 10:30",
                "The newest one of 10:30 or before, by this host's clock.",
            ),
            ("secondsite open --list", "What is open, where, and how much was written to it."),
        ],
    ),
    (
        "close",
        &[("secondsite close db1", "Close all points of db1, and throw away what was written.")],
    ),
    (
        "keep",
        &[(
            "secondsite keep db1 --point 5e7736459c9b28f14675f65a20e9329f --name before-upgrade",
            "Keep a point until it is released, under a name.",
        )],
    ),
    (
        "export",
        &[(
            "secondsite export db1 --point before-upgrade --format qcow2 -o db1.qcow2",
            "Write the only volume of that point into an image for QEMU.",
        )],
    ),
    ("token", &[("secondsite token --ttl 10m", "A token for one server, good for 10 minutes.")]),
    (
        "join",
        &[
            ("secondsite join dr1:7443 --token ss1_4Q9", "Join as this host's name."),
            (
                "secondsite join dr1:7443 --token - --name db1",
                "Read the token from stdin, where no process list shows it.",
            ),
        ],
    ),
    (
        "protect",
        &[
            (
                "secondsite protect db1 --volumes all --rpo 30s --dry-run",
                "Show what would be replicated.",
            ),
            ("secondsite protect db1 --volumes /dev/sda,/dev/vg0/pg", "Replicate two volumes."),
        ],
    ),
    ("unprotect", &[("secondsite unprotect db1", "Stop; the replica and its points stay.")]),
    (
        "status",
        &[
            ("secondsite status", "All servers."),
            ("secondsite status db1 --watch", "One server, until interrupted."),
        ],
    ),
    ("points", &[("secondsite points db1 --json", "Recovery points for a script.")]),
    ("cut", &[("secondsite cut db1 --wait", "A recovery point now; returns when it is listed.")]),
    ("verify", &[("secondsite verify db1", "Ends with 65 if anything differs.")]),
    (
        "explain",
        &[
            ("secondsite explain db1", "Why it is as it is, and what to type."),
            ("secondsite explain --list", "All codes."),
        ],
    ),
    (
        "check",
        &[(
            "secondsite check db1 --warning 1m --critical 5m",
            "For Nagios, with limits of its own.",
        )],
    ),
    ("doctor", &[("secondsite doctor", "Before setup or join, and when something is wrong.")]),
    ("config", &[("secondsite config check", "After a change, before a restart.")]),
];

pub(super) fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let shell = match args.what {
        Generated::Bash => Shell::Bash,
        Generated::Zsh => Shell::Zsh,
        Generated::Fish => Shell::Fish,
        Generated::Man => {
            let missing = || Failure::new(Exit::Usage, "generate man: --out DIR is needed");
            return pages(args.out.as_deref().ok_or_else(missing)?);
        }
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "secondsite", &mut script);
    output::data(&String::from_utf8_lossy(&script));
    Ok(())
}

/// `secondsite.1`, and one page a command.
fn pages(dir: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(dir).map_err(|error| Failure::io("create", dir, &error))?;
    let mut cli = Cli::command().disable_help_subcommand(true);
    cli.build();
    let shown = |command: &&Command| !command.is_hide_set();
    write(dir, "secondsite", &cli, &[])?;
    for command in cli.get_subcommands().filter(shown) {
        let examples = EXAMPLES.iter().find(|(name, _)| *name == command.get_name());
        let title = format!("secondsite-{}", command.get_name());
        write(dir, &title, command, examples.map_or(&[], |(_, examples)| examples))?;
    }
    Ok(())
}

fn write(
    dir: &Path,
    title: &str,
    command: &Command,
    examples: &[(&str, &str)],
) -> Result<(), Failure> {
    let path = dir.join(format!("{title}.1"));
    let written = page(title, command, examples).and_then(|page| std::fs::write(&path, page));
    written.map_err(|error| Failure::io("write", &path, &error))
}

fn page(title: &str, command: &Command, examples: &[(&str, &str)]) -> std::io::Result<Vec<u8>> {
    // The page is found by `man secondsite-cut`; the line to type is `secondsite cut`.
    let version = format!("secondsite {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).title(title).source(version).manual("Secondsite");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let mut head = Roff::new();
    head.control("SH", ["NAME"]).text([roman(format!("{title} - {about}"))]);
    head.to_writer(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        let mut list = Roff::new();
        list.control("SH", ["COMMANDS"]);
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
            item(&mut list, bold(format!("secondsite-{}(1)", sub.get_name())), &about);
        }
        list.to_writer(&mut page)?;
    }
    let mut rest = Roff::new();
    if !examples.is_empty() {
        rest.control("SH", ["EXAMPLES"]);
        for (line, what) in examples {
            item(&mut rest, bold(*line), what);
        }
    }
    rest.control("SH", ["EXIT STATUS"]);
    let codes = if command.get_name() == "check" { &CHECK_CODES[..] } else { &EXIT_CODES[..] };
    for (code, meaning) in codes {
        item(&mut rest, bold(*code), meaning);
    }
    rest.control("SH", ["FILES"]);
    for (path, what) in [
        ("/etc/secondsite", "configuration, keys and certificates; drop-ins in conf.d"),
        ("/var/lib/secondsite", "state"),
        ("/run/secondsite", "locks, and the sockets that serve metrics"),
    ] {
        item(&mut rest, bold(path), what);
    }
    rest.to_writer(&mut page)?;
    Ok(page)
}

fn item(page: &mut Roff, term: Inline, text: &str) {
    page.control("TP", []).text([term]).text([roman(text)]);
}

#[cfg(test)]
mod tests {
    use super::{EXAMPLES, EXIT_CODES};
    use crate::cli::args::Cli;
    use crate::cli::failure::Exit;
    use clap::{CommandFactory, Parser};

    #[test]
    fn every_command_has_examples_and_each_can_be_typed() {
        let cli = Cli::command();
        for command in cli.get_subcommands().filter(|command| !command.is_hide_set()) {
            let name = command.get_name();
            let (_, examples) = EXAMPLES.iter().find(|(of, _)| *of == name).expect(name);
            assert!(!examples.is_empty(), "{name}");
            for (line, _) in *examples {
                let parsed = Cli::try_parse_from(line.split(' '));
                parsed.unwrap_or_else(|error| panic!("{line}: {error}"));
                assert_eq!(line.split(' ').nth(1), Some(name), "{line}");
            }
        }
    }

    #[test]
    fn the_exit_codes_of_the_pages_are_those_of_the_commands() {
        for (code, _) in EXIT_CODES.iter().skip(1) {
            let code: u8 = code.parse().unwrap();
            assert_eq!(Exit::from_code(code) as u8, code);
        }
    }
}
